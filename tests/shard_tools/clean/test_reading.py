"""Annotation files as JSON, JSON lines and Parquet: one set of rules, the same bytes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_tools.clean.columns import TableFile
from shard_tools.clean.reading import Division
from tests.fixtures.mutilate import mutilations
from tests.shard_tools.clean.test_program import Workplace, record
from vlal_dist.errors import ConfigError

NAMES = ("red", "blue", "shiny", "wet", "grün", "a\u00a0b", " old ")


def records(number: int = 40) -> list[dict[str, Any]]:
    """Some plain ones, some whose names and ids are not printable, and a duplicate."""
    draw = np.random.default_rng(3)
    found = []
    for n in range(number):
        one = record(n, str(draw.choice(["car", "bus", "t\u2007shirt"])), [], [])
        one["image_id"] = f"p{n // 3}.jpg"
        for field in ("positive_attributes", "negative_attributes"):
            one[field] = [str(name) for name in draw.choice(NAMES, draw.integers(0, 4))]
        one["instance_bbox"] = None if n % 7 == 0 else [*draw.integers(1, 99, 3).tolist(), 60.5]
        found.append(one)
    found[5]["instance_id"] = "5\u00a0"
    return [*found, found[2]]


BAD = [
    {"instance_id": " "},
    {"instance_id": None},
    {"image_id": "x" * 1001},
    {"object_name": ""},
    {"object_name": "a\nb"},
    {"positive_attributes": None},
    {"negative_attributes": ["red", None]},
    {"negative_attributes": ["red", ""]},
    {"instance_bbox": [0.0, 0.0, 0.0, 5.0]},
    {"instance_bbox": [0.0, float("nan"), 5.0, 5.0]},
    {"instance_bbox": [0.0, None, 5.0, 5.0]},
    {"instance_bbox": [0.0, 1.0, 5.0]},
    {"instance_bbox": []},
]
"""Changes of a record that both JSON and Parquet can hold."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("instance_id", pa.string()),
        ("instance_bbox", pa.list_(pa.float64())),
        ("object_name", pa.string()),
        ("positive_attributes", pa.list_(pa.string())),
        ("negative_attributes", pa.list_(pa.string())),
        ("more", pa.string()),
    ]
)


def write_jsonl(path: Path, given: list[Any]) -> None:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in given))


def write_parquet(path: Path, given: list[Any], schema: pa.Schema = SCHEMA) -> None:
    pq.write_table(pa.Table.from_pylist(given, schema), path, row_group_size=16)


def with_types(**types: pa.DataType) -> pa.Schema:
    return pa.schema([(field.name, types.get(field.name, field.type)) for field in SCHEMA])


WIDE = with_types(
    image_id=pa.large_string(),
    instance_id=pa.string_view(),
    object_name=pa.dictionary(pa.int32(), pa.string()),
    instance_bbox=pa.large_list(pa.float64()),
    positive_attributes=pa.large_list(pa.large_string()),
    negative_attributes=pa.list_(pa.dictionary(pa.int32(), pa.string())),
)
FORMS: dict[str, tuple[str, Callable[[Path, list[Any]], None]]] = {
    "lines": ("a.jsonl", write_jsonl),
    "ndjson": ("a.NDJSON", write_jsonl),
    "parquet": ("a.parquet", write_parquet),
    "parquet by content": ("a.data", write_parquet),
    "other types": ("a.parquet", lambda path, given: write_parquet(path, given, WIDE)),
    "fixed boxes": (
        "a.parquet",
        lambda path, given: write_parquet(
            path, given, with_types(instance_bbox=pa.list_(pa.float64(), 4))
        ),
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    place = Workplace(tmp_path)
    place.config["clean"] |= {"min_side": 0, "require_positive": False, "max_rejected": 1.0}
    return place


def run_on(place: Workplace, path: Path, root: str, **settings: object) -> int:
    argv = ["--paths.instances", str(place.folder / root)]
    return place.run(*argv, annotations={"train": [str(path)]}, **settings)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_the_same_records_give_the_same_bytes(place: Workplace, form: str) -> None:
    place.write("a.json", records())
    assert run_on(place, place.folder / "a.json", "json") == 0
    name, write = FORMS[form]
    write(place.folder / name, records())
    assert run_on(place, place.folder / name, "other") == 0
    assert place.digests("other") == place.digests("json")
    boxes = pq.read_table(place.folder / "json" / "train.parquet")["box"].to_pylist()
    assert boxes[0] == [0, 0, float("inf"), float("inf")] and boxes[1][2] < 100


@pytest.mark.parametrize("form", ["lines", "parquet", "other types"])
def test_all_forms_reject_the_same_records_in_order(place: Workplace, form: str) -> None:
    given = records()
    for n, change in enumerate(BAD):
        given.insert(3 * n, {**record(100 + n, "car", ["red"], []), "image_id": "7", **change})
    place.write("a.json", given)
    assert run_on(place, place.folder / "a.json", "json") == 0
    name, write = FORMS[form]
    write(place.folder / name, given)
    assert run_on(place, place.folder / name, "other") == 0
    expected, found = place.rejects("json"), place.rejects("other")
    assert len(found) == len(BAD) + 1
    for one, other in zip(expected, found, strict=True):
        where = f"{name}:{3 * expected.index(one) + 1}: " if form == "lines" else f"{name}["
        if one["reason"] != "duplicate":
            assert one.pop("detail").partition(": ")[2] == other["detail"].partition(": ")[2]
            assert other.pop("detail").startswith(where)
        assert one == other
    for table in ("train.parquet", "vocabulary.json"):
        assert place.digests("other")[table] == place.digests("json")[table]


def test_numbers_may_be_ids_but_no_names(place: Workplace) -> None:
    path = place.folder / "a.parquet"
    given = [{**record(n, "car", ["red"], []), "instance_id": n, "image_id": n} for n in range(3)]
    write_parquet(path, given, with_types(image_id=pa.int64(), instance_id=pa.uint16()))
    assert run_on(place, path, "a") == 0
    rows = pq.read_table(place.folder / "a" / "train.parquet").to_pylist()
    assert [(row["instance_id"], row["image_id"]) for row in rows] == [(c, c) for c in "012"]
    numbers = [{**one, "image_id": 0.5, "positive_attributes": [1]} for one in given]
    schema = with_types(
        image_id=pa.string(), instance_id=pa.int8(), positive_attributes=pa.list_(pa.int64())
    )
    write_parquet(path, [{**one, "image_id": "p"} for one in numbers], schema)
    assert run_on(place, path, "b") == 65
    assert {row["reason"] for row in place.rejects("b")} == {"bad_attributes"}
    write_parquet(path, numbers, with_types(image_id=pa.float64(), instance_id=pa.int8(),
                                            positive_attributes=pa.list_(pa.int64())))  # fmt: skip
    assert run_on(place, path, "c") == 65
    assert {row["reason"] for row in place.rejects("c")} == {"bad_id"}


def test_text_that_is_not_utf_8_is_rejected_and_the_rest_is_read(place: Workplace) -> None:
    given = [record(n, "car", ["red"], ["blue"]) for n in range(6)]
    columns = {name: [one[name] for one in given] for name in SCHEMA.names[:-1]}
    columns["image_id"] = [str(one) for one in columns["image_id"]]
    columns["object_name"] = [b"car", b"caf\xe9", *[b"car"] * 4]
    columns["positive_attributes"] = [[b"red"]] * 4 + [[b"red", b"\xff"], [b"red"]]
    arrays = []
    for name, column in columns.items():
        if name == "object_name":
            arrays.append(pa.array(column, pa.binary()).view(pa.string()))
        elif name == "positive_attributes":
            lists = pa.array(column, pa.list_(pa.binary()))
            values = lists.values.view(pa.string())
            arrays.append(pa.ListArray.from_arrays(lists.offsets, values))
        else:
            arrays.append(pa.array(column, SCHEMA.field(name).type))
    path = place.folder / "a.parquet"
    pq.write_table(pa.Table.from_arrays(arrays, names=list(columns)), path)
    assert run_on(place, path, "out") == 0
    assert [(row["instance_id"], row["reason"]) for row in place.rejects()] == [
        ("1", "bad_object"),
        ("4", "bad_attributes"),
    ]
    assert all("not UTF-8" in row["detail"] for row in place.rejects())


def test_lines_that_are_no_json_are_named_by_their_number(place: Workplace) -> None:
    path = place.folder / "a.jsonl"
    good = [json.dumps(record(n, "car", ["red"], ["blue"])) for n in range(3)]
    lines = [f"\ufeff{good[0]}", "", "{", good[1], "[" * 100_000, " ", "[1]", good[2][:-3]]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert run_on(place, path, "out") == 0
    assert [(row["reason"], row["detail"].partition(": ")[0]) for row in place.rejects()] == [
        ("not_json", "a.jsonl:3"),
        ("not_json", "a.jsonl:5"),
        ("not_a_record", "a.jsonl:7"),
        ("not_json", "a.jsonl:8"),
    ]
    assert place.json("clean.json")["records"] == 6


def test_a_line_without_end_is_passed_over(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_tools.clean.reading.LONGEST_LINE", 300)
    path = place.folder / "a.jsonl"
    good = json.dumps(record(1, "car", ["red"], ["blue"]))
    path.write_text(f"{'x' * 1000}\n{good}\n{'y' * 1000}")
    assert run_on(place, path, "out") == 0
    assert [row["detail"] for row in place.rejects()] == [
        "a.jsonl:1: a line of more than 300 bytes",
        "a.jsonl:3: a line of more than 300 bytes",
    ]


def test_files_that_are_no_parquet(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.folder / "a.parquet"
    path.write_text("[]")
    assert run_on(place, path, "out") == 65
    assert "is not Parquet (it does not begin with PAR1); write it again" in capsys.readouterr().err
    pq.write_table(pa.table({"image_id": ["1"], "label": ["red"]}), path)
    assert run_on(place, path, "out") == 65
    error = capsys.readouterr().err
    assert "has 0 columns instance_id (its columns: 'image_id', 'label'), and must" in error
    write_parquet(path, records())
    path.write_bytes(path.read_bytes()[:-20])
    assert run_on(place, path, "out") == 65
    assert "is damaged Parquet after row 0" in capsys.readouterr().err
    assert not (place.folder / "out" / "clean.json").exists()


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(10, 100, 10))]
)
@pytest.mark.parametrize("form", ["json", "lines", "parquet"])
def test_mutilated_files_end_in_a_message_or_rejects(
    place: Workplace, capsys: pytest.CaptureFixture[str], form: str, first: int
) -> None:
    if form == "json":
        path = Path(place.write("a.json", records()))
    else:
        path = place.folder / FORMS[form][0]
        FORMS[form][1](path, records())
    whole = path.read_bytes()
    for seed in range(first, first + 10):
        path.write_bytes(mutilations(whole, seed))
        assert run_on(place, path, f"out{seed}") in (0, 65), seed
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out, seed


@pytest.mark.parametrize("row_group", [1, 7, 64, 1000])
def test_a_table_in_batches_has_the_bytes_of_one_that_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int
) -> None:
    monkeypatch.setattr("shard_tools.clean.columns.ROW_GROUP", row_group)
    draw = np.random.default_rng(row_group)
    lists = [draw.integers(0, 99, draw.integers(0, 5)).tolist() for _ in range(200)]
    schema = pa.schema([("id", pa.string()), ("numbers", pa.list_(pa.uint32()))])
    for count in (0, row_group, 2 * row_group, 200):
        rows = {"id": [str(n) for n in range(count)], "numbers": (lists * 10)[:count]}
        table = pa.table(rows, schema)
        whole, parts = tmp_path / f"whole{count}", tmp_path / f"parts{count}"
        pq.write_table(
            table, whole, compression="zstd", compression_level=3, row_group_size=row_group
        )
        with TableFile(parts, schema) as file:
            first = 0
            while first < count:
                size = int(draw.integers(1, 150))
                file.append(table.slice(first, size).combine_chunks().to_batches()[0])
                first += size
        assert parts.read_bytes() == whole.read_bytes()


def test_undivided_photos_are_divided_by_a_hash_of_their_name(place: Workplace) -> None:
    given = [{**record(n, "car", ["red"], ["blue"]), "image_id": f"p{n // 2}"} for n in range(600)]
    place.write("all.json", given)
    write_parquet(place.folder / "all.parquet", given)

    def run(name: str, root: str, **settings: object) -> dict[str, list[str]]:
        files = {"all": [str(place.folder / name)]}
        argv = ["--paths.instances", str(place.folder / root)]
        assert place.run(*argv, annotations=files, **settings) == 0
        return {
            split: pq.read_table(place.folder / root / f"{split}.parquet")["image_id"].to_pylist()
            for split in place.json("clean.json", root)["splits"]
        }

    found = run("all.json", "a", split="80/10/10")
    assert list(found) == ["train", "val", "test"]
    assert [len(set(photos)) for photos in found.values()] == [252, 23, 25]
    assert sum(len(set(photos)) for photos in found.values()) == 300  # none is in two
    assert run("all.parquet", "b", split="80/10/10") == found
    assert place.digests("a") == place.digests("b")
    assert run("all.json", "c", split="80/10/10", split_seed=1) != found
    assert list(run("all.json", "d", split="90/0/10")) == ["train", "test"]
    manifest = place.json("clean.json", "a")
    assert (manifest["split"], manifest["split_seed"]) == ("80/10/10", 0)


def test_the_division_is_that_of_its_definition() -> None:
    names = [f"p{n}" for n in range(50)]
    bits = [hashlib.sha256(f"7\0{name}".encode()).digest()[:8] for name in names]
    share = [int.from_bytes(one, "big") / 2**64 for one in bits]
    expected = [0 if one < 0.8 else 1 if one < 0.9 else 2 for one in share]
    assert [Division("80/10/10", 7).number(name) for name in names] == expected
    assert [Division("80.0/ 10 /10", 7).number(name) for name in names] == expected
    assert Division("100/0/0", 0).splits == ["train"]
    assert {Division("0/0/100", 5).number(str(n)) for n in range(50)} == {2}


@pytest.mark.parametrize("shares", ["", "80/20", "80/10/11", "a/b/c", "110/-10/0", "1/1/98/0"])
def test_shares_must_sum_to_a_hundred(shares: str) -> None:
    with pytest.raises(ConfigError, match="three numbers that sum to 100, such as 80/10/10"):
        Division(shares, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"annotations": {"all": ["a.json"]}}, "give --clean.split 80/10/10"),
        ({"split": "80/10/10"}, "give all files as one list, {all: [...]}, or leave clean.split"),
        (
            {"split": "0/50/50", "annotations": {"all": ["a.json"]}},
            "clean.feasible_splits is ['train'], clean.annotations has ['val', 'test']",
        ),
    ],
)
def test_wrong_divisions(
    place: Workplace, capsys: pytest.CaptureFixture[str], settings: dict[str, object], message: str
) -> None:
    assert place.run(**settings) == 64
    assert message in capsys.readouterr().err
