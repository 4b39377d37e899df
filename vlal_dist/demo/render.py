"""Render the demo's photographs and annotations: `python -m vlal_dist.demo.render`.

Writes, in VAW's record format and with the same bytes for the same seed:

    annotations/{train,val,test}.json     boxes, object names, partial labels
    images/IMAGE.jpg                      photographs of train and val
    images_test.zip                       those of test, as Visual Genome comes in archives
    attribute_types.json                  type -> attributes
    attribute_parent_types.json           parent type -> types
    truth.parquet                         every attribute present: instance_id, positive
    render.json                           the settings and counts, written last
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlal_dist.demo.scene import draw_scene
from vlal_dist.demo.world import ATTRIBUTES, KINDS, PARENT_TYPES, TYPES, annotate, pick

SPLITS = {"train": 620, "val": 110, "test": 180}
QUICK_SPLITS = {"train": 200, "val": 50, "test": 70}
ZIPPED = "test"
MERGE_TABLE = "merge_table.json"
JPEG_QUALITY = 90

Record = dict[str, Any]


@dataclass(frozen=True)
class Photo:
    """One rendered image with its records and, aside, the complete truth of each."""

    image_id: str
    jpg: bytes
    records: list[Record]
    truth: list[list[str]]


def render_photo(task: tuple[int, int, int]) -> Photo:
    """Render image (seed, split number, index); a pure function of the three."""
    rng = np.random.default_rng(task)
    picture, objects = draw_scene(rng)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    image_id = str((task[1] + 1) * 100_000 + task[2])
    records: list[Record] = []
    for number, placed in enumerate(objects):
        positive, negative = annotate(rng, placed.traits)
        records.append(
            {
                "image_id": image_id,
                "instance_id": f"{image_id}{number:03d}",
                "instance_bbox": [float(side) for side in placed.box],
                "instance_polygon": None,
                "object_name": pick(rng, KINDS[placed.traits.kind].names),
                "positive_attributes": positive,
                "negative_attributes": negative,
            }
        )
    truth = [sorted(placed.traits.attributes()) for placed in objects]
    return Photo(image_id, buffer.getvalue(), records, truth)


def render_dataset(
    root: Path, *, seed: int, splits: dict[str, int], workers: int
) -> dict[str, object]:
    """Render every split into `root` and return the counts.

    Args:
        root: folder; a finished one with the same settings is left as it is.
        seed: all randomness follows from it.
        splits: split name -> number of images.
        workers: processes; the bytes do not depend on it.
    """
    settings: dict[str, object] = {"seed": seed, "splits": splits}
    root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name(MERGE_TABLE), root / MERGE_TABLE)
    done = root / "render.json"
    if done.is_file():
        found: dict[str, object] = json.loads(done.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in settings} == settings:
            return found
        done.unlink()
    (root / "annotations").mkdir(exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    photos: list[Photo] = []
    # Not fork: the caller may hold threads.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for number, (split, count) in enumerate(splits.items()):
            tasks = [(seed, number, index) for index in range(count)]
            rendered = pool.map(render_photo, tasks, chunksize=10)
            _write_photos(root, split, rendered)
            records = [record for photo in rendered for record in photo.records]
            _write_json(root / "annotations" / f"{split}.json", records)
            photos += rendered
    _write_json(root / "attribute_types.json", TYPES)
    _write_json(root / "attribute_parent_types.json", PARENT_TYPES)
    records = [record for photo in photos for record in photo.records]
    truth = [names for photo in photos for names in photo.truth]
    columns = {
        "instance_id": pa.array([record["instance_id"] for record in records], pa.string()),
        "positive": pa.array(truth, pa.list_(pa.string())),
    }
    pq.write_table(pa.table(columns), root / "truth.parquet")
    labels = sum(len(one["positive_attributes"] + one["negative_attributes"]) for one in records)
    counts: dict[str, object] = {
        **settings,
        "images": len(photos),
        "instances": len(records),
        "attributes": len(ATTRIBUTES),
        "hidden": round(1 - labels / (len(records) * len(ATTRIBUTES)), 4),
    }
    _write_json(done, counts)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and render."""
    parser = argparse.ArgumentParser(prog="python -m vlal_dist.demo.render", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/demo/data"), help="folder written")
    parser.add_argument("--seed", type=int, default=1, help="all randomness follows from it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--quick", action="store_true", help="about a third of the images")
    given = parser.parse_args(argv)
    started = time.monotonic()
    counts = render_dataset(
        given.root,
        seed=given.seed,
        splits=QUICK_SPLITS if given.quick else SPLITS,
        workers=given.workers,
    )
    summary = ", ".join(f"{key} {value}" for key, value in counts.items())
    sys.stdout.write(f"render: done: {summary}, seconds {time.monotonic() - started:.1f}\n")
    return 0


def _write_photos(root: Path, split: str, photos: Sequence[Photo]) -> None:
    """Into the folder, or an archive with a fixed date, so that equal photos give equal bytes."""
    if split != ZIPPED:
        for photo in photos:
            (root / "images" / f"{photo.image_id}.jpg").write_bytes(photo.jpg)
        return
    with zipfile.ZipFile(root / f"images_{split}.zip", "w") as archive:
        for photo in photos:
            archive.writestr(zipfile.ZipInfo(f"images/{photo.image_id}.jpg"), photo.jpg)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
