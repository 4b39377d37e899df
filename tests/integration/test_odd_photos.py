"""Odd photos through the whole pipeline: used with the right pixels, or rejected with a reason.

No stage refuses what an earlier one accepted. Where crops that do not decode were packed by an
earlier version, each remedy of the message is tried.
"""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from tests.fixtures.damaged_tars import undecodable_copy
from tests.fixtures.odd_photos import OddPhoto, odd_photos
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from tests.integration.test_run_stages import call, write_run
from tests.integration.test_training_runs import arguments, start
from vlal_dist import predict
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.program import run_program
from vlal_dist.release.model import load_model

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(900)]

SPLITS = ("train", "val", "test")
PARTIAL = (10, 8, 50, 40)
"""A box inside of the photos that have more than a row."""


def write_odd_run(folder: Path, photos: list[OddPhoto]) -> Path:
    """A run whose photos are the small ones and all odd ones, in every split; returns its config.

    Instance ids are `SPLIT NAME whole` and `SPLIT NAME part`.
    """
    config = write_run(folder, epochs=1)
    values = yaml.safe_load(config.read_text())
    values["clean"]["min_side"] = 1
    values["pack"] |= {"max_rejected": 0.9, "max_pixels": 10_000_000}
    config.write_text(yaml.safe_dump(values))
    for split in SPLITS:
        path = folder / f"{split}.json"
        records = json.loads(path.read_text())
        for number, odd in enumerate(photos):
            (folder / f"photos/{split}_{odd.name}.jpg").write_bytes(odd.data)
            height, width = (72, 96) if odd.pixels is None else odd.pixels.shape[:2]
            boxes = {"whole": (0, 0, width, height)}
            if split == "train" and min(height, width) > 60:
                boxes["part"] = PARTIAL
            for kind, box in boxes.items():
                like = records[number % 12]  # a real record's labels
                own: dict[str, Any] = {"image_id": f"{split}_{odd.name}", "instance_bbox": box}
                own["instance_id"] = f"{split} {odd.name} {kind}"
                records.append({**like, **own})
        path.write_text(json.dumps(records))
    return config


def check_crops(dataset: Dataset, photos: list[OddPhoto]) -> None:
    """Each instance is a sample with the reference's pixels, or a reject with its reason."""
    for name in SPLITS:
        split = open_split(dataset, name)
        reader = SampleReader(split)
        samples = [reader.read(row) for row in range(split.num_samples)]
        found = {one.instance_id: one.jpg for one in samples}
        rejects = pq.read_table(Path(dataset.url) / name / "rejects.parquet").to_pylist()
        reasons = {row["instance_id"]: row["reason"] for row in rejects}
        for odd in photos:
            for kind in ("whole", "part"):
                instance = f"{name} {odd.name} {kind}"
                if odd.pixels is None and (kind == "whole" or name == "train"):
                    assert reasons[instance] == odd.reason and instance not in found
                elif odd.pixels is not None and (instance in found or kind == "whole"):
                    assert instance not in reasons
                    check_crop(found[instance], odd, kind)


def check_crop(jpg: bytes, odd: OddPhoto, kind: str) -> None:
    """Compare with the reference; JPEG of quality 95 costs up to 3 in the mean."""
    assert odd.pixels is not None
    x, y, w, h = PARTIAL
    expected = odd.pixels[y : y + h, x : x + w] if kind == "part" else odd.pixels
    pixels = np.asarray(Image.open(io.BytesIO(jpg)).convert("RGB")).astype(int)
    assert pixels.shape == expected.shape, odd.name
    error = np.abs(pixels - expected)
    assert error.mean() <= 3 and np.median(error) <= 2, (odd.name, kind, error.mean())
    if kind == "whole" and odd.name.startswith("jpeg") and odd.data[:2] == jpg[:2]:
        unchanged = ("turn", "cmyk", "ycck", "rgb")
        assert error.max() <= 0 or any(word in odd.name for word in unchanged), odd.name


def test_every_photo_is_used_rightly_or_rejected_in_all_stages(tmp_path: Path) -> None:
    photos = odd_photos()
    used = [odd for odd in photos if odd.pixels is not None]
    assert len(photos) >= 100 and len(used) >= 60
    config = write_odd_run(tmp_path, photos)
    assert call(config)[-1] == "export"
    for root in ("dataset", "merged"):
        for tar in (tmp_path / root).rglob("*.tar"):
            content = tar.read_bytes()
            assert not re.search(rb"SECRET|SERIAL|CAMERA|Exif\0", content)
    check_crops(open_dataset(str(tmp_path / "merged"), cache=tmp_path / "cache"), photos)
    assert run("verify", config) == 0
    assert json.loads((tmp_path / "scores/scores.json").read_text())["quarantined"] == {}
    check_predictions(tmp_path, photos)


def check_predictions(folder: Path, photos: list[OddPhoto]) -> None:
    """predict rejects what pack rejected, and answers the rest as for the reference's pixels."""
    table = folder / "table.jsonl"
    rows = [{"image": f"train_{odd.name}.jpg", "id": odd.name, "object": "ball"} for odd in photos]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "answers.jsonl"
    flags = {
        "model": folder / "export",
        "images": folder / "photos",
        "table": table,
        "output": output,
        "top_k": 0,
        "max_pixels": 10_000_000,
    }
    words = [word for name, value in flags.items() for word in (f"--predict.{name}", str(value))]
    assert run_program(predict.PROGRAM, words) == 0
    rejects = [json.loads(line) for line in (folder / "answers.rejects.jsonl").open()]
    assert {row["id"]: row["reason"] for row in rejects} == {
        odd.name: odd.reason for odd in photos if odd.pixels is None
    }
    answers = {row["id"]: row["attributes"] for row in map(json.loads, output.open())}
    model = load_model(folder / "export")
    for odd in photos:
        if odd.pixels is None:
            continue
        image = torch.from_numpy(np.ascontiguousarray(odd.pixels)).permute(2, 0, 1)
        expected = {one.name: one.probability for one in model(image, "ball", top_k=0)}
        found = {one["name"]: one["probability"] for one in answers[odd.name]}
        worst = max(abs(found[name] - value) for name, value in expected.items())
        assert worst <= 0.02, (odd.name, worst)


def test_each_remedy_for_a_crop_that_does_not_decode_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset of an earlier version, with crops of which libjpeg warns in train and in val."""
    config = write_small_vaw(tmp_path)
    run_all(config, ["clean", "pack"])
    whole = open_dataset(str(tmp_path / "dataset"), cache=tmp_path / "cache")
    train, val = tmp_path / "damaged train", tmp_path / "damaged val"
    uid = undecodable_copy(whole, train, split="train", row=3)
    undecodable_copy(whole, val, split="val", row=1)

    def trained(name: str, root: Path, *more: str) -> str:
        own = ("--paths.dataset", str(root), "--paths.merged", str(tmp_path / "none"))
        words = ("--method.loss", "ce_negatifying", "--data.likelihood", "scores")
        process = start(
            [sys.executable, *arguments(tmp_path, tmp_path / name, *own, *words, *more)], {}
        )
        return f"{process.communicate(timeout=300)[0]}\nexit {process.wait()}"

    paths = ("--paths.merged", str(tmp_path / "none"))
    assert run("verify", config, "--paths.dataset", str(train), *paths) == 65
    assert "a crop cannot be decoded: Corrupt JPEG data" in capsys.readouterr().err
    strict = trained("strict", train)
    assert "exit 65" in strict and f"sample uid {uid:016x}: a crop cannot be decoded" in strict
    assert "pack the photos into a new paths.dataset" in strict
    assert "or set data.damage quarantine" in strict and "restore" not in strict
    left_out = ("--data.damage", "quarantine", "--data.max_quarantined", "0.1")
    assert "exit 0" in trained("quarantine", train, *left_out)
    stopped = trained("val", val, *left_out)
    assert "exit 65" in stopped and "pack the photos into a new paths.dataset" in stopped
    assert "data.damage" not in stopped.split("a crop cannot be decoded")[1]
    assert run("pack", config, "--paths.dataset", str(tmp_path / "new")) == 0
    assert run("verify", config, "--paths.dataset", str(tmp_path / "new"), *paths) == 0
