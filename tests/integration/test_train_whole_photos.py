"""A table of whole photos, without boxes and objects, from import to a trained model."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vlal_dist.demo.render import render_dataset

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(900)]

SPLITS = {"train": 90, "val": 16, "test": 24}


def write_table(folder: Path) -> Path:
    """Each rendered object as a photo of its own, and `labels.csv` with a row per label."""
    render_dataset(folder / "data", seed=5, splits=SPLITS, workers=2)
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-e", "data/images_test.zip", "data"],
        cwd=folder,
        check=True,
    )
    rows = []
    (folder / "photos").mkdir()
    for split in SPLITS:
        for one in json.loads((folder / "data" / "annotations" / f"{split}.json").read_text()):
            x, y, w, h = one["instance_bbox"]
            name = f"{one['instance_id']}.jpg"
            with Image.open(folder / "data" / "images" / f"{one['image_id']}.jpg") as photo:
                photo.crop((x, y, x + w, y + h)).save(folder / "photos" / name, quality=90)
            for value, key in (("yes", "positive_attributes"), ("no", "negative_attributes")):
                rows += [(name, split, attribute, value) for attribute in one[key]]
    path = folder / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "split", "attribute", "value"), *rows])
    return path


def vlal(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlal_dist", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_whole_photos_train_to_a_better_map_than_the_constant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    table, root = write_table(tmp_path), tmp_path / "own"
    vlal("import", "table", "--importing.inputs", str(table),
         "--importing.photos", str(tmp_path / "photos"), "--paths.root", str(root))  # fmt: skip
    config = root / "imported" / "config.yaml"
    assert yaml.safe_load(config.read_text())["model"] == {"object_gate": False}
    # Without CLIP: the draw is not weighted, so there is nothing to score.
    settings = {
        "data.likelihood": "scores", "data.image_size": "64", "method.draw_weights": "uniform",
        "method.num_ignore": "5", "model.depth": "18", "model.width": "8", "training.epochs": "8",
        "training.batch_size": "32", "training.lr_new": "3e-3", "training.threads": "1",
    }  # fmt: skip
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    vlal("run", "--config", str(config), "--to", "evaluate", *flags)
    found = {
        name: json.loads((root / f"run/evaluation/test-{name}/result.json").read_text())
        for name in ("model", "constant")
    }
    scores = {name: one["groups"][0]["mAP"] for name, one in found.items()}
    assert scores["model"] > scores["constant"] + 0.05, scores
