"""A small real dataset for tests: photos, VAW-format annotations, a config, and the programs.

Photos are smooth random pictures; each object is a tinted rectangle, so that an attribute can be
learned from pixels. Everything is made from a seed.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from vlal_dist.program import run_program

OBJECTS = ("ball", "cup", "hat", "shoe")
COLORS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220)}
OTHERS = ("round", "soft", "striped", "wooden", "shiny", "old", "open", "wet", "tall")
IMAGES = {"train": 24, "val": 6, "test": 8}


def write_small_vaw(folder: Path, *, seed: int = 0, images: dict[str, int] = IMAGES) -> Path:
    """Write photos, annotations and `config.yaml` under `folder`; returns the config's path."""
    rng = np.random.default_rng(seed)
    photos = folder / "photos"
    photos.mkdir(parents=True)
    number = 0
    for split, count in images.items():
        records: list[dict[str, Any]] = []
        for image in range(count):
            image_id = f"{split}{image}"
            pixels, found = _photo(rng, image_id, number)
            number += len(found)
            records += found
            Image.fromarray(pixels).save(photos / f"{image_id}.jpg", quality=90)
        (folder / f"{split}.json").write_text(json.dumps(records))
    config = {
        "paths": {
            name: str(folder / name)
            for name in ("instances", "dataset", "scores", "merged", "run", "cache")
        },
        "clean": {
            "annotations": {split: [str(folder / f"{split}.json")] for split in images},
            "merge": "none",
            "min_side": 10,
        },
        "pack": {
            "name": "small",
            "images": [str(photos)],
            "shard_bytes": 60_000,
            "block_bytes": 8_192,
            "workers": 1,
        },
        "data": {"image_size": 64},
        "model": {"depth": 18, "width": 8},
        "training": {"epochs": 1, "batch_size": 16, "threads": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(stage: str, config: Path, *arguments: str) -> int:
    """Run a stage in this process: `clean`, `pack`, or a module such as `vlal_dist.evaluate`."""
    names = {"inspect": "inspect_dataset"}
    module = importlib.import_module(
        stage if "." in stage else f"shard_tools.{names.get(stage, stage)}"
    )
    return run_program(module.PROGRAM, ["--config", str(config), *arguments])


def run_all(config: Path, stages: Sequence[str]) -> None:
    """Run stages in order; each must end with 0."""
    for stage in stages:
        assert run(stage, config) == 0, stage


def _photo(
    rng: np.random.Generator, image_id: str, number: int
) -> tuple[np.ndarray[Any, Any], list[dict[str, Any]]]:
    height, width = 120, 160
    noise = rng.normal(128, 30, (height // 8, width // 8, 3)).clip(0, 255).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    pixels = pixels.copy()
    records = []
    for place in range(3):
        color = str(rng.choice(list(COLORS)))
        x, y = 4 + 52 * place, int(rng.integers(4, 50))
        w, h = int(rng.integers(30, 46)), int(rng.integers(30, 60))
        tint = np.array(COLORS[color])
        patch = pixels[y : y + h, x : x + w]
        pixels[y : y + h, x : x + w] = (0.3 * patch + 0.7 * tint).astype(np.uint8)
        owner = int(rng.integers(len(OBJECTS)))
        # Each object has its own six further attributes; validation also knows a seventh.
        known = OTHERS[owner : owner + (7 if image_id.startswith("val") else 6)]
        others = rng.permutation(known)
        absent = [name for name in COLORS if name != color]
        records.append(
            {
                "image_id": image_id,
                "instance_id": f"{number + place:06d}",
                "instance_bbox": [x, y, w, h],
                "instance_polygon": None,
                "object_name": OBJECTS[owner],
                "positive_attributes": sorted([color, *others[: rng.integers(0, 3)].tolist()]),
                "negative_attributes": sorted([absent[0], *others[3 : 3 + rng.integers(0, 5)]]),
            }
        )
    return pixels, records
