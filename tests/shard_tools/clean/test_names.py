"""Names that match nothing, records that hold no names, files that are no JSON: all are said."""

import json
from pathlib import Path
from typing import Any

import pytest

from shard_tools.clean.names import check_table, name_problem, normalized
from tests.shard_tools.clean.test_program import Workplace, record
from vlal_dist.errors import ConfigError


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def annotated(place: Workplace, *records: dict[str, object]) -> None:
    place.write("a.json", list(records))
    place.write("b.json", [record(99, "car", ["red"], ["blue"])])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("red", None),
        ("café ☕ 赤い", None),
        ("a\u00a0b \u200d", None),  # no-break space, zero-width joiner
        (" red ", None),
        ("x" * 1000, None),
        ("x" * 1001, "1001 characters, at most 1000"),
        ("", "blank"),
        (" \t", "blank"),
        ("re\0d", "control character U+0000"),
        ("red\n", "control character U+000A"),
        ("\x1b[31mred", "control character U+001B"),
        ("\ud800", "not Unicode text"),
        ("caf\udce9", "not Unicode text"),
        (3, "not a text"),
        (None, "not a text"),
    ],
)
def test_what_is_a_name(name: object, problem: str | None) -> None:
    found = name_problem(name)
    assert found == problem or (problem is not None and found is not None and problem in found)


def test_a_deleted_attribute_that_no_annotation_holds_is_an_error(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run(deleted_attributes=["red", "shinny", "asain"]) == 64
    error = capsys.readouterr().err
    assert "2 of 3 names are no attribute of the annotations: 'shinny' (near: 'shiny')" in error
    assert "'asain'; correct the names, or take them off the list" in error
    assert not (place.folder / "out" / "clean.json").exists()


def test_deletion_does_not_depend_on_case_blanks_or_encoding(place: Workplace) -> None:
    annotated(
        place,
        record(0, "car", ["Asian", "red"], []),
        record(1, "car", [" asian", "red"], ["\uff42lue"]),
        record(2, "car", ["red", "asian  "], ["blue"]),
    )
    assert place.run(deleted_attributes=["asian", "blue"]) == 0
    assert place.json("vocabulary.json")["attributes"] == ["red"]
    assert normalized("A\u00a0 B") == "a b"


def test_with_a_given_vocabulary_an_absent_deleted_attribute_is_a_warning(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run() == 0
    argv = ["--like", str(place.folder / "out"), "--paths.instances", str(place.folder / "new")]
    assert place.run(*argv, deleted_attributes=["asian"], max_rejected=1.0) == 0
    assert any("clean.deleted_attributes: 1 of 1 names" in line for line in warnings(capsys))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"car": ""}, "'car' becomes '', which is no name (blank)"),
        (
            {"car": "a\0"},
            "becomes 'a\\x00', which is no name (holds the control character U+0000)",
        ),
        ({"car": "bus", "bus": "train"}, "'car' becomes 'bus', which itself becomes 'train'"),
        ({"car": "bus", "bus": "car"}, "'car' becomes 'bus', which itself becomes 'car'"),
    ],
)
def test_tables_that_lead_nowhere_are_refused(
    place: Workplace, capsys: pytest.CaptureFixture[str], table: dict[str, str], message: str
) -> None:
    assert place.run(renames=table) == 64
    error = capsys.readouterr().err
    assert "clean.renames: " in error and message in error
    assert place.run(merge="table", merge_table=place.write("table.json", table)) == 65
    assert message in capsys.readouterr().err


def test_a_name_may_stand_for_itself() -> None:
    check_table({"car": "car", "cars": "car"}, what="x", error=ConfigError)


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings logged so far, without time and logger."""
    lines = capsys.readouterr().err.splitlines()
    return [line.split(": ", 1)[1] for line in lines if " WARNING " in line]


def test_names_that_match_nothing_are_named(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run() == 0
    before = warnings(capsys)
    lists = {"head": ["red", "reed", "tall"], "medium": ["blue"], "tail": ["shiny", "small"]}
    settings: dict[str, Any] = {
        "merge": "table",
        "merge_table": place.write("table.json", {"bus": "coach", "carr": "car"}),
        "renames": {"bus": "bus", "bikes": "bike", "coach": "omnibus"},
        "head_tail": place.write("head_tail.json", lists),
        "attribute_types": place.write("types.json", {"hue": ["red", "blues"]}),
        "attribute_parent_types": place.write("parents.json", {"color": ["hue", "tone"]}),
    }
    assert place.run("--paths.instances", str(place.folder / "new"), **settings) == 0
    assert [line for line in warnings(capsys) if line not in before] == [
        "clean.merge_table: 1 of 2 names are no object of the annotations: 'carr' (near: 'car'); "
        "they merge nothing",
        "clean.renames: 'bus' was merged into 'coach' before, and is renamed no more; rename that",
        "clean.renames: 1 of 2 names are no object of the annotations: 'bikes' (near: 'bike'); "
        "they rename nothing",
        "clean.head_tail: 1 of 6 names are no attribute of the annotations: 'reed' (near: 'red'); "
        "they group nothing",
        "clean.attribute_types: 1 of 2 names are no attribute of the annotations: 'blues' (near: "
        "'blue'); they group nothing",
        "clean.attribute_parent_types: 1 of 2 names are no type of clean.attribute_types: 'tone'; "
        "they group nothing",
    ]


def test_groups_of_deleted_attributes_match(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    """VAW's own files list the attributes that its configuration deletes."""
    types = place.write("types.json", {"hue": ["red", "blue"]})
    assert place.run(attribute_types=types, deleted_attributes=["red"]) == 0
    assert not [line for line in warnings(capsys) if "clean.attribute_types" in line]


def test_a_split_that_is_named_twice_counts_once(place: Workplace) -> None:
    assert place.run() == 0
    assert place.run(feasible_splits=["train", "train"]) == 0  # the same bytes


def test_names_that_differ_in_spelling_alone_are_named(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    annotated(place, record(0, "car", ["red", "Red "], ["tall "]), record(1, "Car", ["red"], []))
    assert place.run() == 0
    found = "\n".join(warnings(capsys))
    assert "2 object names differ from others only in case, blanks or encoding" in found
    assert "2 attribute names differ" in found and "'Red ', 'red'" in found
    assert "1 attribute names begin or end with blanks, which are kept: 'tall '" in found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attribute_parent_types": "p.json"}, "clean.attribute_types, which is not set"),
        ({"annotations": {"train": []}}, "clean.annotations.train names no file"),
    ],
)
def test_settings_that_do_nothing_are_refused(
    place: Workplace, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    assert place.run(**settings) == 64
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ('{"head": [], "head": ["red"]}', "has a group twice ('head')"),
        ('{"": ["red"]}', "has the group '' (blank)"),
        ('{"he\\u0000ad": ["red"]}', "control character"),
        ('{"head": ["red"], "tail": ["red"], "medium": []}', "'red' in head and in tail"),
    ],
)
def test_bad_group_files(
    place: Workplace, capsys: pytest.CaptureFixture[str], lists: str, message: str
) -> None:
    path = place.folder / "head_tail.json"
    path.write_text(lists)
    assert place.run(head_tail=str(path)) == 65
    assert message in capsys.readouterr().err


def test_bytes_that_are_no_utf8_reject_their_record_alone(place: Workplace) -> None:
    good, bad = record(0, "car", ["red"], []), record(1, "car", ["CAFE"], [])
    text = json.dumps([good, bad, record(2, "bus", ["blue"], ["red"])]).encode()
    (place.folder / "a.json").write_bytes(text.replace(b"CAFE", b"caf\xe9"))
    assert place.run(max_rejected=0.5) == 0
    (row,) = place.rejects()
    assert (row["instance_id"], row["reason"]) == ("1", "bad_attributes")
    assert "'caf\\udce9': not Unicode text" in row["detail"]


def test_a_file_in_utf16_is_read(place: Workplace) -> None:
    text = (place.folder / "a.json").read_text()
    assert place.run() == 0
    (place.folder / "a.json").write_bytes(text.encode("utf-16"))
    assert place.run() == 0  # the same bytes


@pytest.mark.parametrize(
    ("old", "new", "reason", "shown"),
    [
        ('"instance_id": "1"', '"instance_id": "a\\u0000b"', "bad_id", "a\\x00b"),
        ('"instance_id": "1"', '"instance_id": "\\ud83d"', "bad_id", "\\ud83d"),
        ('"instance_id": "1"', '"instance_id": ' + "1" * 5000, "bad_id", ""),
        ("[0, 0.5, 60, 70]", "[0, 0.5, 60, " + "1" * 5000 + "]", "bad_box", "1"),
        ("[0, 0.5, 60, 70]", "[" * 300 + "]" * 300, "bad_box", "1"),
        ('"object_name": "car"', '"object_name": "a", "object_name": "b"', "repeated_field", "1"),
        ('["red"]', '["' + "x" * 10_000 + '"]', "bad_attributes", "1"),
        ('["red"]', '{"red": 1}', "bad_attributes", "1"),
    ],
)
def test_an_odd_record_is_rejected_and_the_others_are_read(
    place: Workplace, old: str, new: str, reason: str, shown: str
) -> None:
    rows = [json.dumps(record(number, "car", ["red"], ["blue"])) for number in range(3)]
    assert old in rows[1]
    rows[1] = rows[1].replace(old, new)
    (place.folder / "a.json").write_text(f"[{','.join(rows)}]")
    assert place.run(max_rejected=0.5) == 0
    (row,) = place.rejects()
    assert (row["reason"], row["instance_id"]) == (reason, shown)
    assert row["detail"].startswith("a.json[1]: ") and len(row["detail"]) < 300
    assert place.json("clean.json")["splits"]["train"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[\n{},\n{]", "a.json is not JSON (line 3, column 2: Expecting property name"),
        ('{"a": 1}\n{"a": 2}\n', "line 2, column 1: Extra data; a file holds one JSON value"),
        ("[" * 100_000, "is not JSON (its brackets are nested hundreds deep)"),
        ('[{"a":' * 50_000, "is not JSON (its brackets are nested hundreds deep)"),
        ('{"images": [], "annotations": []}', "object with the keys 'images', 'annotations', not"),
        ("\ufeff\ufeff[]", "is not JSON"),
        ("[" + "9" * 5000, "is not JSON (line 1"),
    ],
)
def test_files_that_are_no_list_of_records(
    place: Workplace, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (place.folder / "a.json").write_text(text)
    assert place.run() == 65
    error = capsys.readouterr().err
    assert message in error and "clean.annotations.train" in error
    assert len(error) < 1000 and "Traceback" not in error


def test_a_cleaning_that_leaves_nothing_says_why_and_lists_its_rejects(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads((place.folder / "a.json").read_text())
    rows = [{k: v for k, v in one.items() if k != "instance_bbox"} for one in good]
    place.write("a.json", [*rows, {**good[0], "instance_id": "x", "object_name": ""}])
    place.write("b.json", [])
    assert place.run() == 65
    error = capsys.readouterr().err
    assert "no instance is left (after each step: read 0" in error
    assert "rejected 5: 4 missing_field, such as 0 of train: a.json[0]: instance_bbox; 1 bad_object"
    assert "; 1 bad_object, such as x of train: a.json[4]: object_name is ''" in error
    assert f"listed in {place.folder}/out/rejects.parquet" in error
    assert "correct the records, or clean.annotations" in error
    assert len(place.rejects()) == 5
    place.write("a.json", good)  # the remedy works in the same root
    place.write("b.json", [record(4, "car", ["red"], ["tall"])])
    assert place.run() == 0
    assert place.rejects() == []


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"min_side": 500}, "lower clean.min_side"),
        ({"deleted_attributes": ["red"]}, "set clean.require_positive false"),
    ],
)
def test_the_step_that_left_nothing_names_its_setting(
    place: Workplace, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], remedy: str
) -> None:
    annotated(place, record(0, "car", ["red"], ["blue"]))
    assert place.run(**settings) == 65
    assert remedy in capsys.readouterr().err


def test_one_sided_labels_are_said(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    annotated(place, record(0, "car", ["red"], ["blue"]), record(1, "car", ["blue"], []))
    place.write("b.json", [record(5, "car", ["red"], [])])
    assert place.run() == 0
    assert warnings(capsys) == [
        "no attribute has both positive and negative labels in test (1 positive, 0 negative): "
        "average precision is undefined there, and so is mAP; annotate both, or count what is "
        "unannotated as absent (evaluation.unannotated: negative)"
    ]
