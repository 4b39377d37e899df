"""The demo's annotations in every format: imported, cleaned and packed to equal bytes.

The reference is what `clean` and `pack` make of VAW's JSON with the same information. Formats that
cannot say everything are compared with a reference that says no more: attribute_ids and Open
Images' relationships list only what is present, and Open Images gives boxes no ids.
"""

import csv
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shard_tools.importers.program import main
from tests.fixtures.tiny_vaw import run
from vlal_dist.demo.render import render_dataset
from vlal_dist.demo.world import ATTRIBUTES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPLITS = {"train": 16, "val": 5, "test": 5}
Row = dict[str, Any]
Data = dict[str, list[Row]]
"""Split -> records as VAW writes them."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data, smaller; all photos in one folder."""
    folder = tmp_path_factory.mktemp("rendered")
    render_dataset(folder, seed=3, splits=SPLITS, workers=2)
    with zipfile.ZipFile(folder / "images_test.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def data(demo: Path) -> Data:
    """Records of each split; photos are named with their suffix, as other formats do."""
    found: Data = {}
    for split in SPLITS:
        records = json.loads((demo / "annotations" / f"{split}.json").read_text())
        found[split] = [one | {"image_id": f"{one['image_id']}.jpg"} for one in records]
    return found


def pack(config: Path) -> dict[str, str]:
    """Clean and pack; sha256 of the dataset's files that do not hold times."""
    assert run("clean", config) == 0
    assert run("pack", config) == 0
    root = config.parent / "dataset"
    if not root.exists():
        root = config.parent.parent / "dataset"
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".result." not in path.name and ".config." not in path.name
    }


class Reference:
    """Datasets packed from VAW's JSON, each once."""

    def __init__(self, folder: Path, photos: Path) -> None:
        self.folder, self._photos = folder, photos
        self._known: dict[str, dict[str, str]] = {}

    def __call__(self, name: str, data: Data) -> dict[str, str]:
        if name not in self._known:
            root = self.folder / name / "demo"
            root.mkdir(parents=True)
            for split, records in data.items():
                (root / f"{split}.json").write_text(json.dumps(records))
            values = {
                "paths": {"root": str(root)},
                "clean": {"annotations": {split: [f"{root}/{split}.json"] for split in data}},
                "pack": {"images": [str(self._photos)]},
            }
            (root / "config.yaml").write_text(json.dumps(values))
            self._known[name] = pack(root / "config.yaml")
        return self._known[name]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"), demo / "images")


@pytest.fixture
def imported(tmp_path: Path, demo: Path) -> Callable[..., dict[str, str]]:
    """Import files by the real program, clean and pack with the configuration that it wrote."""

    def work(word: str, inputs: dict[str, list[Path]], *words: str) -> dict[str, str]:
        root = tmp_path / "demo"
        files = {split: [str(path) for path in paths] for split, paths in inputs.items()}
        flags = ["--importing.inputs", json.dumps(files), "--paths.root", str(root)]
        if "--importing.photos" not in words:
            words = (*words, "--importing.photos", str(demo / "images"))
        assert main([word, *flags, *words]) == 0
        return pack(root / "imported" / "config.yaml")

    return work


def all_of(data: Data) -> Data:
    return data


def without_negatives(data: Data) -> Data:
    return {
        split: [one | {"negative_attributes": []} for one in records]
        for split, records in data.items()
    }


def all_annotated(data: Data) -> Data:
    """What is not present is absent."""
    return {
        split: [
            one | {"negative_attributes": sorted(set(ATTRIBUTES) - set(one["positive_attributes"]))}
            for one in records
        ]
        for split, records in data.items()
    }


def settled(one: Row) -> tuple[list[str], list[str]]:
    """Labels of a record, those that contradict each other as absent, as clean does."""
    negative = one["negative_attributes"]
    return [name for name in one["positive_attributes"] if name not in negative], negative


def write_coco(folder: Path, data: Data, label: Callable[[Row], Row]) -> dict[str, list[Path]]:
    """COCO files, one per split; `label` gives an annotation's keys for its attributes."""
    paths = {}
    for split, records in data.items():
        images = list(dict.fromkeys(one["image_id"] for one in records))
        names = list(dict.fromkeys(one["object_name"] for one in records))
        document = {
            "info": {"description": "the demo"},
            "images": [{"id": number, "file_name": name} for number, name in enumerate(images)],
            "categories": [{"id": 7 + number, "name": name} for number, name in enumerate(names)],
            "attributes": [{"id": number, "name": name} for number, name in enumerate(ATTRIBUTES)],
            "annotations": [
                {
                    "id": int(one["instance_id"]),
                    "image_id": images.index(one["image_id"]),
                    "category_id": 7 + names.index(one["object_name"]),
                    "bbox": one["instance_bbox"],
                    "iscrowd": 0,
                    **label(one),
                }
                for one in records
            ],
        }
        path = folder / f"instances_{split}.json"
        path.write_text(json.dumps(document))
        paths[split] = [path]
    return paths


def as_vector(one: Row) -> Row:
    positive, negative = settled(one)
    return {"att_vec": [
        1 if name in positive else 0 if name in negative else -1 for name in ATTRIBUTES
    ]}  # fmt: skip


def as_names(one: Row) -> Row:
    positive, negative = settled(one)
    return {"attributes": dict.fromkeys(positive, True) | dict.fromkeys(negative, False)}


def as_ids(one: Row) -> Row:
    return {"attribute_ids": [ATTRIBUTES.index(name) for name in one["positive_attributes"]]}


@pytest.mark.parametrize(
    ("label", "same", "words"),
    [
        (as_names, all_of, ()),
        (as_vector, all_of, ()),
        (as_ids, without_negatives, ()),
        (as_ids, all_annotated, ("--importing.unlisted", "absent")),
    ],
    ids=["names", "vector", "ids", "ids, the others absent"],
)
def test_coco(
    label: Callable[[Row], Row],
    same: Callable[[Data], Data],
    words: Sequence[str],
    data: Data,
    tmp_path: Path,
    imported: Callable[..., dict[str, str]],
    reference: Reference,
) -> None:
    found = imported("coco", write_coco(tmp_path, data, label), *words)
    assert found == reference("all" if same is all_of else same.__name__, same(data))


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def codes(names: Sequence[str]) -> dict[str, str]:
    """Name -> a code as Open Images has them."""
    return {name: f"/m/0{number:04x}" for number, name in enumerate(names)}


def write_names(folder: Path, code: dict[str, str]) -> Path:
    rows = [{"LabelName": value, "DisplayName": name} for name, value in code.items()]
    return write_csv(folder / "class-descriptions.csv", rows)


def by_photo(records: Sequence[Row]) -> dict[str, list[Row]]:
    photos: dict[str, list[Row]] = {}
    for one in records:
        photos.setdefault(one["image_id"], []).append(one)
    return photos


def photo_labels(records: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Attributes of a photo: present in one object; absent in one and present in none."""
    positive = sorted({name for one in records for name in settled(one)[0]})
    negative = sorted({name for one in records for name in settled(one)[1]} - set(positive))
    return positive, negative


def whole_photos(data: Data, *, suffix: str = "") -> Data:
    """A record per photo, without box and object."""
    return {
        split: [
            {
                "image_id": Path(image).stem + suffix,
                "instance_id": Path(image).stem + suffix,
                "instance_bbox": None,
                "object_name": "image",
                "positive_attributes": photo_labels(objects)[0],
                "negative_attributes": photo_labels(objects)[1],
            }
            for image, objects in by_photo(records).items()
        ]
        for split, records in data.items()
    }


def test_openimages_labels_of_photos(
    data: Data,
    tmp_path: Path,
    imported: Callable[..., dict[str, str]],
    reference: Reference,
) -> None:
    code = codes(ATTRIBUTES)
    names, paths = write_names(tmp_path, code), {}
    for split, records in whole_photos(data).items():
        rows = [
            {"ImageID": one["image_id"], "Source": "verification", "LabelName": code[name],
             "Confidence": value}
            for one in records
            for value, key in ((1, "positive_attributes"), (0, "negative_attributes"))
            for name in one[key]
        ]  # fmt: skip
        rows.append(rows[0] | {"Source": "machine", "LabelName": code["red"], "Confidence": 0.7})
        paths[split] = [write_csv(tmp_path / f"{split}-human-imagelabels.csv", rows)]
    paths["train"].append(names)
    found = imported("openimages", paths)
    assert found == reference("whole_photos", whole_photos(data))


def test_openimages_boxes(
    data: Data,
    demo: Path,
    tmp_path: Path,
    imported: Callable[..., dict[str, str]],
    reference: Reference,
) -> None:
    objects = sorted({one["object_name"] for records in data.values() for one in records})
    code = codes([*ATTRIBUTES, *objects])
    names, same = write_names(tmp_path, code), Data()
    paths: dict[str, list[Path]] = {}
    for split, records in data.items():
        boxes, relations, same[split] = [], [], []
        for image, group in by_photo(records).items():
            with Image.open(demo / "images" / image) as photo:
                width, height = photo.size
            for number, one in enumerate(group):
                x, y, w, h = one["instance_bbox"]
                sides = {"XMin": x / width, "XMax": (x + w) / width,
                         "YMin": y / height, "YMax": (y + h) / height}  # fmt: skip
                name = {"ImageID": Path(image).stem}
                box = {**name, "LabelName": code[one["object_name"]], **sides}
                boxes.append(box)
                relations += [
                    {**name, "LabelName1": box["LabelName"], "LabelName2": code[attribute],
                     **{f"{side}{end}": value for end in (1, 2) for side, value in sides.items()},
                     "RelationshipLabel": "is"}
                    for attribute in one["positive_attributes"]
                ]  # fmt: skip
                same[split].append(one | {
                    "image_id": name["ImageID"],
                    "instance_id": f"{name['ImageID']}#{number}",
                    "negative_attributes": [],
                })  # fmt: skip
        paths[split] = [
            write_csv(tmp_path / f"{split}-annotations-bbox.csv", boxes),
            write_csv(tmp_path / f"{split}-annotations-vrd.csv", relations),
        ]
    paths["train"].append(names)
    assert imported("openimages", paths) == reference("boxes", same)


def write_long(path: Path, records: Sequence[Row]) -> Path:
    rows = []
    for one in records:
        x, y, w, h = one["instance_bbox"]
        positive, negative = settled(one)
        head = {"image": one["image_id"], "id": one["instance_id"], "object": one["object_name"],
                "x": x, "y": y, "w": w, "h": h}  # fmt: skip
        rows += [
            head | {"attribute": name, "value": value}
            for value, names in ((1, positive), (0, negative))
            for name in names
        ]
    return write_csv(path, rows)


def write_wide(path: Path, records: Sequence[Row]) -> Path:
    rows = []
    for one in records:
        x, y, w, h = one["instance_bbox"]
        positive, negative = settled(one)
        values = {name: 1 if name in positive else 0 if name in negative else ""
                  for name in ATTRIBUTES}  # fmt: skip
        head = {"image": one["image_id"], "id": one["instance_id"], "object": one["object_name"],
                "x": x, "y": y, "w": w, "h": h}  # fmt: skip
        rows.append(head | values)
    return write_csv(path, rows)


def write_lines(path: Path, records: Sequence[Row]) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return path


@pytest.mark.parametrize(
    ("suffix", "write"),
    [("long.csv", write_long), ("wide.csv", write_wide), ("lists.jsonl", write_lines)],
    ids=["long", "wide", "lists"],
)
def test_tables(
    suffix: str,
    write: Callable[[Path, Sequence[Row]], Path],
    data: Data,
    tmp_path: Path,
    imported: Callable[..., dict[str, str]],
    reference: Reference,
) -> None:
    paths = {split: [write(tmp_path / f"{split}-{suffix}", rows)] for split, rows in data.items()}
    assert imported("table", paths) == reference("all", data)


def with_bytes(records: Sequence[Row], photos: Path) -> list[Row]:
    """Rows as Hugging Face's datasets write them, the photo's bytes in each."""
    return [
        {
            "image": {"bytes": (photos / one["image_id"]).read_bytes(), "path": one["image_id"]},
            "id": one["instance_id"],
            "object": one["object_name"],
            "box": one["instance_bbox"],
            "positive": one["positive_attributes"],
            "negative": one["negative_attributes"],
        }
        for one in records
    ]


def test_parquet_with_the_bytes_of_photos(
    data: Data,
    demo: Path,
    tmp_path: Path,
    imported: Callable[..., dict[str, str]],
    reference: Reference,
) -> None:
    same, paths = whole_photos(data, suffix=".jpg"), {}
    for split, records in same.items():
        rows = with_bytes(records, demo / "images")
        table = pa.Table.from_pylist(rows).drop_columns(["id", "object", "box"])
        paths[split] = [tmp_path / f"{split}.parquet"]
        pq.write_table(table, paths[split][0])
    found = imported("table", paths, "--importing.photos", "[]")
    assert found == reference("whole_photos_jpg", same)


def test_parquet_with_a_photo_in_each_row_of_its_objects(
    data: Data,
    demo: Path,
    tmp_path: Path,
    imported: Callable[..., dict[str, str]],
    reference: Reference,
) -> None:
    """Photos are named by row then, because paths occur twice; the labels are the same."""
    paths = {}
    for split, records in data.items():
        paths[split] = [tmp_path / f"{split}.parquet"]
        pq.write_table(pa.Table.from_pylist(with_bytes(records, demo / "images")), paths[split][0])
    imported("table", paths, "--importing.photos", "[]")
    reference("all", data)
    for split in data:
        assert labels_by_id(tmp_path / "demo", split) == labels_by_id(
            reference.folder / "all" / "demo", split
        )


def labels_by_id(root: Path, split: str) -> dict[str, tuple[list[str], list[str]]]:
    table = pq.read_table(root / "dataset" / split / "labels.parquet").to_pylist()
    return {one["instance_id"]: (one["positive"], one["negative"]) for one in table}
