"""What a record must hold, and what becomes of one that does not."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shard_tools.clean.records import WHOLE_PHOTO, Instance, NotJson, Reject, parse_records
from tests.shard_tools.clean.columns import read_rows
from vlal_dist.errors import DataError


def record(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "image_id": 7,
        "instance_id": "70",
        "instance_bbox": [1, 2.5, 60, 80],
        "instance_polygon": None,
        "object_name": "car",
        "positive_attributes": ["red"],
        "negative_attributes": ["blue", "green"],
    }
    return {**values, **changes}


def parse(*records: object) -> tuple[list[Instance], list[Reject]]:
    return parse_records(enumerate(records), split="train", place=lambda n: f"train.json[{n}]")


def drop_duplicates(instances: Sequence[Instance], folder: Path) -> list[Instance]:
    rows = read_rows(instances, folder)
    repeated = set(rows.duplicates().tolist())
    return [one for number, one in enumerate(instances) if number not in repeated]


def test_a_record_becomes_an_instance() -> None:
    instances, rejects = parse(record(title="ignored"), record(instance_id=71, image_id="7a"))
    assert rejects == []
    assert instances[0] == Instance(
        split="train",
        instance_id="70",
        image_id="7",
        object_name="car",
        box=(1.0, 2.5, 60.0, 80.0),
        positive=("red",),
        negative=("blue", "green"),
    )
    assert (instances[1].instance_id, instances[1].image_id) == ("71", "7a")


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 0, 60],
        [0, 0, 60, -1],
        [0, 0, math.nan, 60],
        [math.inf, 0, 60, 60],
        [0, 0, 60, 10**400],
        [0, 0, "60", 60],
        [0, 0, True, 60],
        [0, 0, None, 60],
        [0, 0, 60],
        [0, 0, 60, 60, 60],
        {"x": 0},
        "",
    ],
)
def test_a_bad_box_is_rejected(box: object) -> None:
    instances, rejects = parse(record(instance_bbox=box))
    assert instances == []
    assert (rejects[0].reason, rejects[0].instance_id) == ("bad_box", "70")
    assert rejects[0].detail.startswith("train.json[0]: instance_bbox is ")


def test_no_box_is_the_whole_photo() -> None:
    assert [i.box for i in parse(record(instance_bbox=None))[0]] == [WHOLE_PHOTO]


def test_nan_in_a_file_reaches_the_check() -> None:
    text = json.dumps(record()).replace("2.5", "NaN")
    assert [reject.reason for reject in parse(json.loads(text))[1]] == ["bad_box"]


@pytest.mark.parametrize(
    ("changes", "reason", "instance_id"),
    [
        ({"instance_id": None}, "bad_id", ""),
        ({"instance_id": True}, "bad_id", ""),
        ({"instance_id": 1.5}, "bad_id", ""),
        ({"instance_id": " "}, "bad_id", ""),
        ({"image_id": ["7"]}, "bad_id", "70"),
        ({"object_name": ""}, "bad_object", "70"),
        ({"object_name": 3}, "bad_object", "70"),
        ({"object_name": "\ud800"}, "bad_object", "70"),
        ({"positive_attributes": "red"}, "bad_attributes", "70"),
        ({"positive_attributes": None}, "bad_attributes", "70"),
        ({"negative_attributes": ["blue", 4]}, "bad_attributes", "70"),
        ({"negative_attributes": [""]}, "bad_attributes", "70"),
    ],
)
def test_bad_values_are_rejected(changes: dict[str, Any], reason: str, instance_id: str) -> None:
    instances, rejects = parse(record(), record(**changes))
    assert len(instances) == 1
    assert (rejects[0].reason, rejects[0].instance_id) == (reason, instance_id)
    assert "train.json[1]" in rejects[0].detail
    rejects[0].detail.encode()


@pytest.mark.parametrize(
    "field",
    ["image_id", "instance_id", "instance_bbox", "object_name", "positive_attributes",
     "negative_attributes"],
)  # fmt: skip
def test_a_missing_field_is_named(field: str) -> None:
    values = record()
    del values[field]
    rejects = parse(values)[1]
    assert (rejects[0].reason, rejects[0].detail) == ("missing_field", f"train.json[0]: {field}")


@pytest.mark.parametrize("value", [None, 3, "text", ["list"]])
def test_other_json_values_are_rejected(value: object) -> None:
    assert [reject.reason for reject in parse(value)[1]] == ["not_a_record"]


def test_identical_duplicates_are_rejected_once_each(tmp_path: Path) -> None:
    same = record(negative_attributes=["green", "blue", "blue"])
    kept = drop_duplicates(parse(record(), same, record(instance_id="71"))[0], tmp_path)
    assert [instance.instance_id for instance in kept] == ["70", "71"]


def test_conflicting_duplicates_stop_the_work(tmp_path: Path) -> None:
    instances = parse(record(), record(object_name="bus"))[0]
    with pytest.raises(DataError, match=r"1 instance ids .*: 70 \(twice in train\)"):
        drop_duplicates(instances, tmp_path)


def test_an_id_in_two_splits_stops_the_work(tmp_path: Path) -> None:
    train, _ = parse(record())
    test, _ = parse_records([(0, record())], split="test", place=str)
    with pytest.raises(DataError, match=r"70 \(train, test\)"):
        drop_duplicates([*train, *test], tmp_path)


def test_duplicates_are_compared_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard_tools.clean.columns.COMPARED", 4)
    given = parse(*(record(instance_id=n % 20) for n in range(60)))[0]
    assert drop_duplicates(given, tmp_path / "a") == given[:20]
    wrong = parse(*(record(instance_id=n, object_name="bus") for n in (3, 17, 5, 3)))[0]
    with pytest.raises(DataError, match=r"3 instance ids .*: 3 \(.*; 17 \(.*; 5 \("):
        drop_duplicates([*given, *wrong], tmp_path / "b")


def test_a_line_without_json_is_rejected_with_what_is_wrong() -> None:
    assert [(r.reason, r.detail) for r in parse(NotJson("column 3"))[1]] == [
        ("not_json", "train.json[0]: column 3")
    ]
