"""COCO JSON in the layouts of OVAD, Fashionpedia, PACO, and with names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shard_tools.importers.coco import read_coco
from tests.shard_tools.importers.reading import Found, read_all, reasons
from vlal_dist.errors import DataError

IMAGES = [{"id": 69356, "width": 640, "height": 505, "file_name": "val2017/000000069356.jpg"}]
CATEGORIES = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 47, "name": "cup"}]


def annotation(number: int, **more: Any) -> dict[str, Any]:
    """One annotation of the photo, a cup."""
    return {
        "id": number,
        "image_id": 69356,
        "category_id": 47,
        "bbox": [556.67, 159.5, 20.53, 41.09],
        "area": 843.6,
        "iscrowd": 0,
    } | more


def import_file(folder: Path, annotations: list[Any], **more: Any) -> Found:
    """Import one file; keys of ImportConfig are given as `settings`."""
    settings = more.pop("settings", {})
    document = {
        "info": {"description": "made up"},
        "images": IMAGES,
        "categories": CATEGORIES,
        "annotations": annotations,
    } | more
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return read_all(read_coco, inputs={"train": [str(path)]}, **settings)


def labels(found: Found) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Positive and negative names of each record."""
    return [(one.positive, one.negative) for one in found.records]


OVAD = [
    {"id": 0, "name": "cleanliness:clean/neat", "type": "cleanliness", "freq_set": "head"},
    {"id": 1, "name": "material:wood"},
    {"id": 2, "name": "color:red"},
]


def test_ovad_vector(tmp_path: Path) -> None:
    found = import_file(
        tmp_path,
        [annotation(2309, att_vec=[1, 0, -1]), annotation(2310, att_vec=[-1, -1, 1])],
        attributes=OVAD[::-1],  # positions are ids, whatever the order of the list
    )
    assert labels(found) == [
        (("cleanliness:clean/neat",), ("material:wood",)),
        (("color:red",), ()),
    ]
    first = found.records[0]
    assert (first.split, first.image_id, first.instance_id, first.object_name, first.box) == (
        "train", "val2017/000000069356.jpg", "2309", "cup", (556.67, 159.5, 20.53, 41.09),
    )  # fmt: skip


def test_another_reading_of_numbers(tmp_path: Path) -> None:
    found = import_file(
        tmp_path,
        [annotation(1, att_vec=[1, 0, -1])],
        attributes=OVAD,
        settings={"numbers": "1/-1/0"},
    )
    assert labels(found) == [(("cleanliness:clean/neat",), ("color:red",))]


def test_vectors_that_do_not_fit(tmp_path: Path) -> None:
    found = import_file(
        tmp_path,
        [
            annotation(1, att_vec=[1, 0]),
            annotation(2, att_vec=[1, 2, 0]),
            annotation(3, att_vec=[1, "yes", 0]),
            annotation(4, att_vec={"a": 1}),
        ],
        attributes=OVAD,
    )
    assert not found.records
    assert reasons(found) == [
        (0, "bad_attributes"),
        (1, "bad_value"),
        (2, "bad_value"),
        (3, "bad_attributes"),
    ]
    assert "att_vec has 2 values, the list attributes 3" in found.rejected[0].detail


FASHIONPEDIA = [
    {"id": 0, "name": "classic (t-shirt)", "supercategory": "nickname", "level": 1},
    {"id": 115, "name": "symmetrical", "supercategory": "silhouette", "level": 1},
    {"id": 340, "name": "plain (pattern)", "supercategory": "textile pattern", "level": 1},
]


@pytest.mark.parametrize(
    ("unlisted", "negative"),
    [("unknown", ()), ("absent", ("classic (t-shirt)",))],
)
def test_fashionpedia_ids(tmp_path: Path, unlisted: str, negative: tuple[str, ...]) -> None:
    found = import_file(
        tmp_path,
        [annotation(1, attribute_ids=[115, 340])],
        attributes=FASHIONPEDIA,
        settings={"unlisted": unlisted},
    )
    assert labels(found) == [(("symmetrical", "plain (pattern)"), negative)]


def test_fashionpedia_attributes_of_whole_photos(tmp_path: Path) -> None:
    entry = {"id": 1, "image_id": 69356, "attribute_ids": [0]}
    found = import_file(tmp_path, [entry], attributes=FASHIONPEDIA)
    (record,) = found.records
    assert (record.object_name, record.box, record.positive) == ("", None, ("classic (t-shirt)",))


def test_paco_types(tmp_path: Path) -> None:
    known = {"unknown_color": 0, "unknown_material": 1}
    found = import_file(
        tmp_path,
        [
            annotation(1, attribute_ids=[1], **known),
            annotation(2, attribute_ids=[], **known),  # nothing of the type: not filled in
            annotation(3),
        ],
        attributes=[{"id": n, "name": name} for n, name in enumerate(["black", "blue", "wood"])],
        attr_type_to_attr_idxs={"color": [0, 1], "material": [2]},
    )
    assert labels(found) == [(("blue",), ("black",)), ((), ()), ((), ())]


def test_lists_of_names(tmp_path: Path) -> None:
    found = import_file(
        tmp_path,
        [annotation(1, attributes=["red", "wet"]), annotation(2, attributes=["old"])],
        settings={"unlisted": "absent"},
    )
    assert labels(found) == [(("red", "wet"), ("old",)), (("old",), ("red", "wet"))]


def test_objects_of_names(tmp_path: Path) -> None:
    values = {"red": True, "wet": False, "old": None, "soft": 1, "tall": 0, "open": "ja"}
    found = import_file(
        tmp_path,
        [annotation(1, attributes=values), annotation(2, attributes={"open": "vielleicht"})],
        settings={"values": {"ja": "present"}},
    )
    assert labels(found) == [(("red", "soft", "open"), ("wet", "tall"))]
    assert reasons(found) == [(1, "bad_value")]


def test_what_cannot_be_used_is_rejected_with_its_place(tmp_path: Path) -> None:
    named = {"attributes": ["red"]}
    found = import_file(
        tmp_path,
        [
            annotation(0, **named),
            annotation(0, **named),
            annotation(1, **named, image_id=7),
            annotation(2, **named, category_id="none"),
            annotation(3, **named, bbox=[1, 2, 0, 4]),
            annotation(4, **named, bbox=[float("nan"), 2, 3, 4]),
            annotation(5, **named, iscrowd=1),
            annotation(6, attributes=["red", 7]),
            annotation(7, attributes="red"),
            annotation(8, **named) | {"id": [8]},
            "no object",
            annotation(9, attribute_ids=[4]),
        ],
        images=[*IMAGES, {"id": 7}, "x"],
    )
    assert len(found.records) == 1
    assert reasons(found) == [
        (1, "bad_images"),
        (2, "bad_images"),
        (1, "repeated_id"),
        (2, "unknown_images"),
        (3, "unknown_categories"),
        (4, "bad_box"),
        (5, "bad_box"),
        (6, "crowd"),
        (7, "bad_attributes"),
        (8, "bad_attributes"),
        (9, "bad_id"),
        (10, "not_a_record"),
        (11, "bad_attributes"),
    ]
    assert found.rejected[2].detail.startswith("annotations[1]: ")
    assert {one.file for one in found.rejected} == {"annotations.json"}


def test_equal_ids_of_two_files(tmp_path: Path) -> None:
    paths = {}
    for split in ("train", "val"):
        values = {"images": IMAGES, "categories": CATEGORIES,
                  "annotations": [annotation(1, attributes=[split])]}  # fmt: skip
        paths[split] = [str(tmp_path / f"{split}.json")]
        Path(paths[split][0]).write_text(json.dumps(values))
    found = read_all(read_coco, inputs=paths)
    assert [(one.split, one.instance_id) for one in found.records] == [
        ("train", "1"),
        ("val", "1@1"),
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "a JSON list, not COCO's object"),
        ({"images": []}, "no list 'annotations'"),
        (
            {"images": [], "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]},
            "no annotation has attributes, as attributes or attribute_ids or att_vec",
        ),
    ],
)
def test_files_that_are_no_coco(tmp_path: Path, document: object, message: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        read_all(read_coco, inputs=str(path))


def test_ids_as_texts_and_numbers_are_one(tmp_path: Path) -> None:
    entry: Mapping[str, Any] = annotation(1, image_id="69356", category_id=47.0, attributes=["a"])
    assert len(import_file(tmp_path, [entry]).records) == 1
