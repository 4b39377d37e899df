"""The rendered dataset: same bytes for a seed, valid VAW records, honest partial labels."""

import io
import json
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlal_dist.demo import render
from vlal_dist.demo.render import render_dataset, render_photo
from vlal_dist.demo.scene import HEIGHT, WIDTH, draw_scene
from vlal_dist.demo.world import (
    ATTRIBUTES,
    KINDS,
    OBJECTS,
    STATE_PAIRS,
    TYPE_OF,
    TYPES,
    annotate,
    plausible_attributes,
    sample_traits,
)

SPLITS = {"train": 6, "val": 2, "test": 3}
MERGE_TABLE = Path(render.__file__).parent / "merge_table.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rendered")
    render_dataset(folder, seed=3, splits=SPLITS, workers=2)
    yield folder


def read_records(root: Path) -> list[dict[str, object]]:
    names = [root / "annotations" / f"{split}.json" for split in SPLITS]
    return [record for name in names for record in json.loads(name.read_text())]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_same_bytes_for_any_worker_count(root: Path, tmp_path: Path) -> None:
    render_dataset(tmp_path, seed=3, splits=SPLITS, workers=1)
    assert digests(tmp_path) == digests(root)


def test_another_seed_gives_other_photos() -> None:
    assert render_photo((3, 0, 0)).jpg != render_photo((4, 0, 0)).jpg
    assert render_photo((3, 0, 0)).jpg != render_photo((3, 1, 0)).jpg


def test_a_finished_folder_is_left_alone_and_other_settings_replace_it(tmp_path: Path) -> None:
    one, two = {"train": 1, "val": 1, "test": 1}, {"train": 2, "val": 1, "test": 1}
    first = render_dataset(tmp_path, seed=3, splits=one, workers=1)
    before = (tmp_path / "truth.parquet").stat().st_mtime_ns
    assert render_dataset(tmp_path, seed=3, splits=one, workers=1) == first
    assert (tmp_path / "truth.parquet").stat().st_mtime_ns == before
    assert render_dataset(tmp_path, seed=3, splits=two, workers=1)["images"] == 4


def test_records_are_vaw_records(root: Path) -> None:
    records = read_records(root)
    assert len({record["instance_id"] for record in records}) == len(records)
    for record in records:
        assert set(record) == {
            "image_id",
            "instance_id",
            "instance_bbox",
            "instance_polygon",
            "object_name",
            "positive_attributes",
            "negative_attributes",
        }
        x, y, width, height = record["instance_bbox"]  # type: ignore[misc]
        assert width > 0 and height > 0
        assert x < WIDTH and y < HEIGHT and x + width > 0 and y + height > 0
        positive, negative = record["positive_attributes"], record["negative_attributes"]
        assert isinstance(positive, list) and isinstance(negative, list)
        assert positive and set(positive) | set(negative) <= set(ATTRIBUTES)
        assert not set(positive) & set(negative)


def test_every_photo_is_there_and_whole(root: Path) -> None:
    archive = zipfile.ZipFile(root / "images_test.zip")
    zipped = {Path(name).stem: archive.read(name) for name in archive.namelist()}
    for record in read_records(root):
        name = str(record["image_id"])
        data = zipped.get(name) or (root / "images" / f"{name}.jpg").read_bytes()
        with Image.open(io.BytesIO(data)) as photo:
            photo.load()
            assert (photo.size, photo.format, photo.mode) == ((WIDTH, HEIGHT), "JPEG", "RGB")
    assert len(zipped) == SPLITS["test"]


def test_labels_agree_with_the_truth_kept_aside(root: Path) -> None:
    table = pq.read_table(root / "truth.parquet").to_pydict()
    truth = dict(zip(table["instance_id"], map(set, table["positive"]), strict=True))
    records = read_records(root)
    assert set(truth) == {record["instance_id"] for record in records}
    for record in records:
        present = truth[str(record["instance_id"])]
        assert set(record["positive_attributes"]) <= present  # type: ignore[call-overload]
        assert not set(record["negative_attributes"]) & present  # type: ignore[call-overload]


def test_about_four_fifths_of_the_labels_are_hidden() -> None:
    rng = np.random.default_rng(0)
    counts = [sum(map(len, annotate(rng, sample_traits(rng)))) for _ in range(2000)]
    assert 0.75 < 1 - np.mean(counts) / len(ATTRIBUTES) < 0.85


def test_salient_attributes_are_mentioned_more_often_than_usual_ones() -> None:
    rng = np.random.default_rng(0)
    present: dict[str, int] = dict.fromkeys(("color", "usual"), 0)
    mentioned = dict(present)
    for _ in range(1500):
        traits = sample_traits(rng)
        positive, _ = annotate(rng, traits)
        for name in traits.attributes():
            group = "color" if TYPE_OF[name] == "color" else "usual"
            if group == "color" or name in STATE_PAIRS.values():
                present[group] += 1
                mentioned[group] += name in positive
    assert mentioned["color"] / present["color"] > 3 * mentioned["usual"] / present["usual"]


def test_feasible_sets_differ_and_are_plausible() -> None:
    sets = {name: plausible_attributes(name) for name in OBJECTS}
    assert len(set(sets.values())) == len(OBJECTS)
    assert "lit" in sets["lamp"] and "lit" not in sets["mug"]
    assert "wooden" in sets["chair"] and not sets["leaf"] & set(TYPES["material"])
    assert all(len(found) < len(ATTRIBUTES) - 5 for found in sets.values())


def test_truth_holds_one_of_each_exclusive_group() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        traits = sample_traits(rng)
        present = traits.attributes()
        for group in ("pattern", "size"):
            assert len(present & set(TYPES[group])) == 1
        for state in KINDS[traits.kind].states:
            assert len(present & {state, STATE_PAIRS[state]}) == 1
        assert 1 <= len(present & set(TYPES["color"])) <= 2


def test_the_merge_table_leaves_one_name_per_kind() -> None:
    table = json.loads(MERGE_TABLE.read_text())
    for name, kind in KINDS.items():
        assert next(iter(kind.names)) == name
        assert {table.get(alias, alias) for alias in kind.names} == {name}


def test_most_boxes_pass_the_size_filter_and_some_leave_the_image() -> None:
    boxes = [p.box for i in range(25) for p in draw_scene(np.random.default_rng([9, i]))[1]]
    small = sum(min(box[2:]) < 50 for box in boxes)
    outside = sum(
        b[0] < 0 or b[1] < 0 or b[0] + b[2] > WIDTH or b[1] + b[3] > HEIGHT for b in boxes
    )
    assert 0 < small < 0.2 * len(boxes)
    assert 0 < outside < 0.4 * len(boxes)


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_kind_in_every_form_can_be_drawn(kind: str) -> None:
    from vlal_dist.demo.shading import Light, draw_sprite

    light = Light(direction=(-0.4, -0.6, 0.69), ambient=0.5, direct=0.6, tint=(1, 1, 1))
    rng = np.random.default_rng(5)
    for _ in range(6):
        sprite = draw_sprite(rng, sample_traits(rng, kind), light, 70.0)
        assert np.isfinite(sprite.color).all()
        assert 0.15 < sprite.solid.mean() <= 1.0
