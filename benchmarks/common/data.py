"""Made-up data: small crops and whole photos, cleaned and packed by our own tools.

Labels have VAW's density (1.8 present and 1.2 absent of 591 attributes per crop); pixels are smooth
noise with grain: JPEGs of the bytes and decoding time of real crops of their size.
"""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ATTRIBUTES, OBJECTS = 591, 40


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
        name: folder.
        count: photos, each of them one crop.
        width, height: pixels.
        noise: strength of the grain, which decides the bytes of the JPEG.
        quality: of the JPEG.
        side: to which a loader resizes it, pixels.
        shard_bytes: size of its shards.
    """

    name: str
    count: int
    width: int
    height: int
    noise: float
    quality: int
    side: int
    shard_bytes: int


Records = list[dict[str, object]]
Annotate = Callable[[np.random.Generator, Kind], Records]
"""Makes the records of a kind of data, as VAW's files have them."""

# Crops enough that an epoch outlasts a measurement, as every real one does.
CROPS = Kind("crops", 72_000, 60, 80, 6.0, 85, 64, 24_000_000)
PHOTOS = Kind("photos", 2_400, 500, 375, 14.0, 90, 224, 20_000_000)


def make(folder: Path, kind: Kind, *, seed: int = 0, annotate: Annotate | None = None) -> Path:
    """Write, clean and pack one kind of data, unless it is there; returns the dataset root.

    Args:
        folder: of all data.
        kind: what to make.
        seed: of pixels and annotations.
        annotate: gives the records; absent: each photo is one crop, labels have VAW's density.
    """
    root = folder / kind.name / "dataset"
    if (root / "dataset.json").exists():
        return root
    source = folder / kind.name / "source"
    source.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(source / "images.zip", "w", zipfile.ZIP_STORED) as file:
        for number in range(kind.count):
            file.writestr(f"{number}.jpg", photo(rng, kind))
    (source / "train.json").write_text(json.dumps((annotate or _records)(rng, kind)))
    config = {
        "paths": {"instances": str(folder / kind.name / "instances"), "dataset": str(root)},
        "clean": {
            "annotations": {"train": [str(source / "train.json")]},
            "merge": "none",
            "min_side": 1,
            "require_positive": False,
        },
        # Eight shards or more: webdataset deals out whole ones.
        "pack": {
            "name": kind.name,
            "images": [str(source / "images.zip")],
            "shard_bytes": kind.shard_bytes,
        },
    }
    path = source / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    for tool in ("clean", "pack"):
        command = [sys.executable, "-m", "shard_tools", tool, "--config", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return root


def photo(rng: np.random.Generator, kind: Kind) -> bytes:
    """A JPEG that is smooth with some grain."""
    coarse = rng.normal(128, 50, (kind.height // 15, kind.width // 15, 3)).clip(0, 255)
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize(
        (kind.width, kind.height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(smooth) + rng.normal(0, kind.noise, (kind.height, kind.width, 3))
    sink = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(sink, "JPEG", quality=kind.quality)
    return sink.getvalue()


def attribute_shares() -> np.ndarray[Any, np.dtype[np.float64]]:
    """How often each attribute is met: as 1 / rank, as VAW's are."""
    share = 1 / np.arange(1, ATTRIBUTES + 1)
    return share / share.sum()


def record(
    number: int, image: int, box: list[int], name: str, positive: list[str], negative: list[str]
) -> dict[str, object]:
    """A record of VAW's format."""
    return {
        "image_id": str(image),
        "instance_id": str(number),
        "instance_bbox": box,
        "instance_polygon": None,
        "object_name": name,
        "positive_attributes": positive,
        "negative_attributes": negative,
    }


def _records(rng: np.random.Generator, kind: Kind) -> Records:
    share, records = attribute_shares(), []
    for number in range(kind.count):
        drawn = rng.choice(ATTRIBUTES, size=8, replace=False, p=share)
        positive = drawn[: 1 + rng.poisson(0.8)].tolist()
        negative = drawn[len(positive) : len(positive) + rng.poisson(1.2)].tolist()
        # Each attribute is met at least once.
        present = sorted({f"a{n}" for n in [*positive, number % ATTRIBUTES]})
        absent = [f"a{n}" for n in negative if n != number % ATTRIBUTES]
        box, name = [0, 0, kind.width, kind.height], f"object{number % OBJECTS}"
        records.append(record(number, number, box, name, present, absent))
    return records
