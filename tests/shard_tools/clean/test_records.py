"""What a record must hold, and what becomes of one that does not."""

import json
import math
from typing import Any

import pytest

from shard_tools.clean.records import Instance, Reject, drop_duplicates, parse_records
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
    return parse_records(records, split="train", source="train.json")


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
        None,
    ],
)
def test_a_bad_box_is_rejected(box: object) -> None:
    instances, rejects = parse(record(instance_bbox=box))
    assert instances == []
    assert (rejects[0].reason, rejects[0].instance_id) == ("bad_box", "70")
    assert rejects[0].detail.startswith("train.json[0]: instance_bbox is ")


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


def test_identical_duplicates_are_rejected_once_each() -> None:
    same = record(negative_attributes=["green", "blue", "blue"])
    kept, rejects = drop_duplicates(parse(record(), same, record(instance_id="71"))[0])
    assert [instance.instance_id for instance in kept] == ["70", "71"]
    assert [(reject.instance_id, reject.reason) for reject in rejects] == [("70", "duplicate")]


def test_conflicting_duplicates_stop_the_work() -> None:
    instances = parse(record(), record(object_name="bus"))[0]
    with pytest.raises(DataError, match=r"1 instance ids .*: 70 \(twice in train\)"):
        drop_duplicates(instances)


def test_an_id_in_two_splits_stops_the_work() -> None:
    train, _ = parse(record())
    test, _ = parse_records([record()], split="test", source="test.json")
    with pytest.raises(DataError, match=r"70 \(train, test\)"):
        drop_duplicates([*train, *test])
