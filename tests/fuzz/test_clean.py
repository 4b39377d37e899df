"""`clean` on altered annotations and side files: the right instances, a reject, or an error."""

import json
import math
import shutil
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from shard_tools.clean.program import clean
from shard_tools.clean.records import WHOLE_PHOTO
from tests.fuzz.mutations import byte_ops, explore, mutate_bytes, mutate_json, obeys, pick, tree_ops
from vlal_dist.config.sections import CleanConfig, Config, PathsConfig
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.vocabulary import PREVALENCES, Vocabulary


def record(number: int, name: str, positive: list[str], negative: list[str]) -> dict[str, Any]:
    return {
        "image_id": number // 2,
        "instance_id": f"i{number}",
        "instance_bbox": [number, 0.5, 60 + number, 70],
        "object_name": name,
        "positive_attributes": positive,
        "negative_attributes": negative,
    }


RECORDS = [
    record(0, "car", ["red", "shiny"], ["blue"]),
    record(1, "cars", ["blue"], ["red"]),
    record(2, "bus", ["blue", "tall"], []),
    record(3, "café", [], ["small"]),
    record(4, "bus", ["red"], ["blue"]),
]
FILES: dict[str, Any] = {
    "attribute_types": {"hue": ["red", "blue"], "size": ["small", "tall"], "rest": ["shiny"]},
    "attribute_parent_types": {"color": ["hue"], "other": ["size", "rest"]},
    "head_tail": {"head": ["red", "blue"], "medium": ["shiny"], "tail": ["small", "tall"]},
    "merge_table": {"cars": "car", "buses": "bus"},
}


class Workplace:
    """A folder with annotations, and `clean` in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "out"
        self.annotations = folder / "train.json"
        self.annotations.write_text(json.dumps(RECORDS))

    def clean(self, flags: Mapping[str, str], **settings: Any) -> dict[str, Any] | None:
        """The closing counts; None: an error that names what is wrong."""
        shutil.rmtree(self.root, ignore_errors=True)
        own = CleanConfig(
            annotations={"train": [str(self.annotations)]},
            min_side=0,
            require_positive=False,
            max_rejected=1.0,
            **{"merge": "none", **settings},
        )
        config = Config(clean=own, paths=PathsConfig(instances=str(self.root)))
        counts: dict[str, Any] | None = obeys(lambda: clean(config, flags))
        assert (counts is not None) == (self.root / "clean.json").exists()
        return counts

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_json(json.loads((self.root / "vocabulary.json").read_text()))

    def rows(self) -> list[tuple[Any, ...]]:
        """Instances with names in place of ids."""
        names = self.vocabulary()
        return [
            (
                row["instance_id"],
                row["image_id"],
                names.objects[row["object_id"]],
                row["box"],
                {names.attributes[one] for one in row["positive"]},
                {names.attributes[one] for one in row["negative"]},
            )
            for row in pq.read_table(self.root / "train.parquet").to_pylist()
        ]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def is_name(value: Any) -> bool:
    if not isinstance(value, str) or not 1 <= len(value) <= 1000 or not value.strip():
        return False
    return not any(unicodedata.category(one) in ("Cc", "Cs") for one in value)


def identity(value: Any) -> Any:
    return str(value) if type(value) is int else value


def usable(one: Any) -> bool:
    """Whether a record can be used, said once more and in another way."""
    if not isinstance(one, dict) or not RECORDS[0].keys() <= one.keys():
        return False
    lists = [one["positive_attributes"], one["negative_attributes"]]
    box = one["instance_bbox"]
    if box is None:  # the whole photo
        box = [0, 0, 1, 1]
    if not (isinstance(box, list) and len(box) == 4 and {type(s) for s in box} <= {int, float}):
        return False
    try:
        sides = [float(side) for side in box]
    except OverflowError:
        return False
    return (
        all(is_name(identity(one[field])) for field in ("instance_id", "image_id"))
        and is_name(one["object_name"])
        and all(isinstance(names, list) and all(map(is_name, names)) for names in lists)
        and all(map(math.isfinite, sides))
        and min(sides[2:]) > 0
    )


def expected_rows(data: bytes) -> list[tuple[Any, ...]] | None:
    """The instances of an annotation file; None: it must be refused as a whole."""
    try:
        records = json.loads(data.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(records, list):
        return None
    rows: dict[str, tuple[Any, ...]] = {}
    for one in filter(usable, records):
        positive, negative = set(one["positive_attributes"]), set(one["negative_attributes"])
        row: tuple[Any, ...] = (
            identity(one["instance_id"]),
            identity(one["image_id"]),
            one["object_name"],
        )
        box = WHOLE_PHOTO if one["instance_bbox"] is None else one["instance_bbox"]
        row += ([float(side) for side in box], positive, negative)
        if rows.setdefault(row[0], row) != row:
            return None
    resolved = [(*row[:4], row[4] - row[5], row[5]) for row in rows.values()]
    return resolved or None


def check_annotations(place: Workplace, data: bytes) -> None:
    place.annotations.write_bytes(data)
    wanted, counts = expected_rows(data), place.clean({})
    if counts is None:
        assert wanted is None
        return
    assert place.rows() == wanted
    rejects = pq.read_table(place.root / "rejects.parquet").to_pylist()
    assert len(rejects) == counts["rejected"] == counts["records"] - counts["instances"]
    assert all(0 < len(reject["detail"]) < 2000 for reject in rejects)


def test_records(place: Workplace, times: int) -> None:
    """Without repeated keys, which JSON trees do not have."""

    def check(tree: Any) -> None:
        check_annotations(place, mutate_json(json.dumps(RECORDS).encode(), tree))

    explore("annotation records", check, tree_ops, examples=150, times=times)


def test_bytes_of_annotations(place: Workplace, times: int) -> None:
    whole = json.dumps(RECORDS, ensure_ascii=False).encode()

    def check(ops: Any) -> None:
        data = mutate_bytes(whole, ops)
        if _has_repeated_keys(data) or data.count(b"\0") > len(data) // 8:  # UTF-16, UTF-32
            place.annotations.write_bytes(data)
            place.clean({})
        else:
            check_annotations(place, data)

    explore("annotation bytes", check, byte_ops, examples=150, times=times)


def _has_repeated_keys(data: bytes) -> bool:
    found = []

    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        found.append(len(values) < len(pairs))
        return values

    try:
        json.loads(data.decode(errors="surrogateescape"), object_pairs_hook=hook)
    except (ValueError, RecursionError):
        return False
    return any(found)


def test_side_files(place: Workplace, times: int) -> None:
    paths = {name: place.folder / f"{name}.json" for name in FILES}

    def check(name: str, as_tree: bool, tree: Any, ops: Any) -> None:
        for one, path in paths.items():
            data = json.dumps(FILES[one]).encode()
            if one == name:
                data = mutate_json(data, tree) if as_tree else mutate_bytes(data, ops)
            path.write_bytes(data)
        settings = {one: str(path) for one, path in paths.items()}
        if place.clean({}, merge="table", **settings) is None:
            return
        names = place.vocabulary()
        assert names.attributes == ("blue", "red", "shiny", "small", "tall")
        assert set(names.prevalence) <= set(PREVALENCES)
        if name != "merge_table":
            assert names.objects == ("bus", "café", "car")
        table = json.loads(paths["merge_table"].read_bytes())
        table = table.get("merges", table)
        wanted = [table.get(one["object_name"], one["object_name"]) for one in RECORDS]
        assert [row[2] for row in place.rows()] == wanted

    explore("side files", check, pick([*FILES]), st.booleans(), tree_ops, byte_ops,
            examples=150, times=times)  # fmt: skip


def test_an_earlier_root(place: Workplace, times: int) -> None:
    """`--like` on a root whose vocabulary or feasible sets were altered."""
    assert place.clean({}) is not None
    like = place.folder / "like"
    shutil.copytree(place.root, like)
    whole = {name: (like / name).read_bytes() for name in ("vocabulary.json", "feasible.npz")}
    before = place.rows()

    def check(name: str, as_tree: bool, tree: Any, ops: Any) -> None:
        for one, data in whole.items():
            if one == name:
                as_tree = as_tree and one.endswith(".json")
                data = mutate_json(data, tree) if as_tree else mutate_bytes(data, ops)
            (like / one).write_bytes(data)
        if place.clean({"like": str(like)}) is None:
            return
        assert place.rows() == before
        feasible = FeasibleSets.from_npz((place.root / "feasible.npz").read_bytes())
        assert feasible.num_objects == len(place.vocabulary().objects)
        assert feasible.indices.max(initial=0) < len(place.vocabulary().attributes)

    explore("root of --like", check, pick([*whole]), st.booleans(), tree_ops, byte_ops,
            examples=100, times=times)  # fmt: skip
