"""`python -m shard_tools clean` from command line to files."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from shard_tools.__main__ import main
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.vocabulary import Vocabulary

FILES = ["feasible.npz", "rejects.parquet", "test.parquet", "train.parquet", "vocabulary.json"]


def record(number: int, name: str, positive: list[str], negative: list[str]) -> dict[str, object]:
    return {
        "image_id": number // 2,
        "instance_id": str(number),
        "instance_bbox": [0, 0.5, 60, 70],
        "object_name": name,
        "positive_attributes": positive,
        "negative_attributes": negative,
    }


class Workplace:
    """A folder with annotation files and a config; runs the program there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {
            "clean": {
                "annotations": {
                    "train": [str(folder / "a.json")],
                    "test": [f"file://{folder}/b.json"],
                },
                "min_side": 50,
                "require_positive": True,
            },
            "paths": {"instances": str(folder / "out")},
        }
        self.write("a.json", [
            record(0, "car", ["red", "shiny"], ["blue"]),
            record(1, "car", ["blue", "red"], ["red"]),
            record(2, "bus", ["blue"], []),
            record(3, "bike", [], ["small"]),
        ])  # fmt: skip
        self.write("b.json", [record(4, "car", ["red"], ["tall"])])

    def write(self, name: str, values: object) -> str:
        path = self.folder / name
        path.write_text(json.dumps(values), encoding="utf-8")
        return str(path)

    def run(self, *argv: str, **clean: object) -> int:
        config = {**self.config, "clean": {**self.config["clean"], **clean}}
        return main(["clean", "--config", self.write("config.yaml", config), *argv])

    def digests(self, root: str = "out") -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((self.folder / root).iterdir())
            if path.name in {*FILES, "clean.json"}
        }

    def json(self, name: str, root: str = "out") -> Any:
        return json.loads((self.folder / root / name).read_text(encoding="utf-8"))

    def rejects(self, root: str = "out") -> list[dict[str, str]]:
        return list(pq.read_table(self.folder / root / "rejects.parquet").to_pylist())


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_files_of_a_root(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("--json", str(place.folder / "counts.json")) == 0
    vocabulary = Vocabulary.from_json(place.json("vocabulary.json"))
    assert vocabulary.objects == ("bike", "bus", "car")
    assert vocabulary.attributes == ("blue", "red", "shiny", "small", "tall")
    table = pq.read_table(place.folder / "out" / "train.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "instance_id": "string",
        "image_id": "string",
        "object_id": "uint32",
        "box": "fixed_size_list<element: double>[4]",
        "positive": "list<element: uint32>",
        "negative": "list<element: uint32>",
    }
    assert table.to_pylist()[1] == {
        "instance_id": "1",
        "image_id": "0",
        "object_id": 2,
        "box": [0.0, 0.5, 60.0, 70.0],
        "positive": [0],
        "negative": [1],
    }
    assert table["instance_id"].to_pylist() == ["0", "1", "2"]
    feasible = FeasibleSets.from_npz((place.folder / "out" / "feasible.npz").read_bytes())
    assert [feasible.of(i).tolist() for i in range(3)] == [[], [0], [0, 1, 2]]
    manifest = place.json("clean.json")
    assert manifest["format"] == 1
    assert manifest["files"] == {k: v for k, v in place.digests().items() if k != "clean.json"}
    assert sorted(manifest["files"]) == FILES
    assert manifest["vocabulary_digest"] == vocabulary.digest
    assert manifest["feasible_digest"] == feasible.digest
    assert manifest["splits"] == {"train": 3, "test": 1}
    counts = json.loads((place.folder / "counts.json").read_text())
    del counts["seconds"], counts["warnings"]
    assert counts == {
        "records": 5,
        "instances": 4,
        "splits": {"train": 3, "test": 1},
        "objects": 3,
        "attributes": 5,
        "feasible_pairs": 4,
        "clashes": 1,
        "rejected": 0,
    }
    assert "clean: done: records 5, instances 4" in capsys.readouterr().out


def test_same_input_same_bytes_and_a_repeat_changes_nothing(place: Workplace) -> None:
    assert place.run() == 0
    first = place.digests()
    times = {path: path.stat().st_mtime_ns for path in (place.folder / "out").glob("*.parquet")}
    assert place.run() == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert place.run("--paths.instances", str(place.folder / "again")) == 0
    assert place.digests("again") == first == place.digests()


def test_a_killed_run_is_continued(place: Workplace) -> None:
    assert place.run() == 0
    whole = place.digests()
    for name in ("clean.json", "train.parquet"):
        (place.folder / "out" / name).unlink()
    assert place.run() == 0
    assert place.digests() == whole


def test_a_root_of_another_cleaning_is_left_alone(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run() == 0
    before = place.digests()
    assert place.run(deleted_attributes=["red"]) == 65
    assert "already holds other bytes" in capsys.readouterr().err
    assert place.digests() == before


def test_expected_counts(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(expected={"read": {"instances": 5}, "feasible": {"pairs": 4}}) == 0
    assert "expected met" in capsys.readouterr().out
    expected = {"require_positive": {"instances": 9}, "read": {"objects": 4}}
    assert place.run(expected=expected) == 0
    assert "expected departs at read: objects 3 instead of 4" in capsys.readouterr().out


def test_a_step_that_drops_more_than_a_fifth_is_remarked_on(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run(min_side=65) == 65
    assert place.run(max_rejected=1) == 0  # one of four training instances has no positive
    shown = capsys.readouterr().out
    assert (
        "clean: warning: clean.require_positive drops 1 of 4 train instances, more than a fifth; "
        "set it false to keep instances that have only negatives"
    ) in shown
    assert place.run("--paths.instances", str(place.folder / "b"), require_positive=False) == 0
    assert "more than a fifth" not in capsys.readouterr().out
    small = [
        {**record(n, "car", ["red"], []), "instance_bbox": [0, 0, 9, 9]} for n in range(20, 24)
    ]
    place.write("b.json", [record(4, "car", ["red"], ["tall"]), *small])
    assert place.run("--paths.instances", str(place.folder / "c")) == 0
    assert "clean.min_side drops 4 of 5 test instances, more than a fifth; lower it" in (
        capsys.readouterr().out
    )


def test_few_rejects_are_success_many_are_not(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = record(9, "car", ["red"], [])
    records = json.loads((place.folder / "a.json").read_text())
    place.write("a.json", [*records, {**bad, "instance_bbox": [0, 0, 0, 0]}, records[0]])
    assert place.run() == 65
    assert "2 of 7 instances were rejected, more than clean.max_rejected 0.001" in (
        capsys.readouterr().err
    )
    assert [(row["instance_id"], row["reason"]) for row in place.rejects()] == [
        ("9", "bad_box"),
        ("0", "duplicate"),
    ]
    assert place.json("clean.json")["rejected"] == 2
    assert place.run(max_rejected=0.3) == 0  # everything was written: nothing to change


def test_an_id_in_two_splits_writes_nothing(place: Workplace) -> None:
    place.write("b.json", [record(0, "car", ["red"], [])])
    assert place.run() == 65
    assert not (place.folder / "out" / "vocabulary.json").exists()


def test_groups_from_files(place: Workplace) -> None:
    head_tail = {"head": ["red"], "medium": ["blue", "tall"], "tail": ["shiny", "small", "unused"]}
    types = {"hue": ["red", "blue"], "size": ["small", "tall"]}
    settings = {
        "head_tail": place.write("head_tail.json", head_tail),
        "attribute_types": place.write("types.json", types),
        "attribute_parent_types": place.write("parents.json", {"color": ["hue"]}),
    }
    assert place.run(**settings) == 0
    vocabulary = Vocabulary.from_json(place.json("vocabulary.json"))
    assert vocabulary.prevalence == ("medium", "head", "tail", "tail", "medium")
    assert vocabulary.attribute_type == ("color", "color", "other", "other", "other")


def test_a_saved_merge_table_gives_the_same_names(place: Workplace) -> None:
    plain = place.write("table.json", {"bus": "car", "absent": "x"})
    assert place.run(merge="table", merge_table=plain) == 0
    assert place.json("vocabulary.json")["merges"] == {"bus": "car"}
    again = str(place.folder / "again")
    saved = str(place.folder / "out" / "vocabulary.json")
    assert place.run("--paths.instances", again, merge="table", merge_table=saved) == 0
    assert place.digests("again") == place.digests()


def test_like_keeps_the_vocabulary_and_rejects_unknown_names(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = place.write("table.json", {"bus": "car"})
    assert place.run(merge="table", merge_table=plain) == 0
    new = [
        record(10, "bus", ["red"], []),
        record(11, "ship", ["red"], []),
        record(12, "car", ["red"], ["odd"]),
    ]
    settings = {
        "annotations": {"test": [place.write("new.json", new)]},
        "merge": "wordnet",  # the table of the earlier dataset, not a new merge
    }
    argv = ["--like", str(place.folder / "out"), "--paths.instances", str(place.folder / "new")]
    assert place.run(*argv, **settings) == 65
    assert "2 of 3 instances were rejected, more than clean.max_unknown 0.5" in (
        capsys.readouterr().err
    )
    assert place.run(*argv, **settings, max_unknown=0.7) == 0
    out = capsys.readouterr().out
    assert "clean: warning: 2 of 3 instances are left out, as the dataset of --like lacks" in out
    assert "rejected 2, unknown_names 2" in out
    assert [(row["instance_id"], row["reason"], row["detail"]) for row in place.rejects("new")] == [
        ("11", "unknown_object", "ship"),
        ("12", "unknown_attribute", "odd"),
    ]
    before, after = place.json("clean.json"), place.json("clean.json", "new")
    assert after["vocabulary_digest"] == before["vocabulary_digest"]
    assert after["files"]["feasible.npz"] == before["files"]["feasible.npz"]
    rows = pq.read_table(place.folder / "new" / "test.parquet").to_pylist()
    assert [(row["instance_id"], row["object_id"]) for row in rows] == [("10", 1)]


def test_enlarged_feasible_sets(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run() == 0
    plain = FeasibleSets.from_npz((place.folder / "out" / "feasible.npz").read_bytes())
    digest = place.json("clean.json")["vocabulary_digest"]
    vectors = {"object_vectors": np.float32([[1, 0], [1, 0.1], [1, 0.1]])}
    path = str(place.folder / "vectors.safetensors")
    settings = {"feasible_top_k": 3, "feasible_votes": 2, "object_vectors": path}
    again = ["--paths.instances", str(place.folder / "more")]
    assert place.run(*again, **settings) == 65
    assert "write it again for the present vocabulary" in capsys.readouterr().err
    save_file(vectors, path, metadata={"vocabulary_digest": "0" * 64})
    assert place.run(*again, **settings) == 65
    assert "is of vocabulary 000" in capsys.readouterr().err
    save_file(vectors, path, metadata={"vocabulary_digest": digest})
    assert place.run(*again, **settings) == 0
    more = FeasibleSets.from_npz((place.folder / "more" / "feasible.npz").read_bytes())
    assert len(more.indices) > len(plain.indices)
    assert all(set(plain.of(i)) <= set(more.of(i)) for i in range(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"annotations": {}}, "clean.annotations is empty"),
        ({"annotations": {"dev": ["a.json"]}}, "split 'dev'; splits are train, val, test"),
        ({"merge": "table"}, "clean.merge_table is not set"),
        ({"feasible_splits": ["train", "val"]}, "name splits that are there, or use --like"),
        ({"feasible_splits": []}, "clean.feasible_splits is []"),
        ({"feasible_top_k": 3}, "which needs clean.object_vectors"),
        ({"expected": {"reed": {}}}, "clean.expected has the step 'reed'"),
        ({"merge": "wordnet", "wordnet_dir": "/nowhere"}, "apt-get install wordnet-base"),
    ],
)
def test_wrong_settings(
    place: Workplace, capsys: pytest.CaptureFixture[str], settings: dict[str, object], message: str
) -> None:
    assert place.run(**settings) == 64
    assert message in capsys.readouterr().err
    assert not (place.folder / "out" / "vocabulary.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; download it, or correct clean.annotations.train"),
        ("[{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("{}", "holds a JSON object, not a list"),
        ("[]", "no instance is left"),
    ],
)
def test_bad_annotation_files(
    place: Workplace, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = place.folder / "bad.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert place.run(annotations={"train": [str(path)]}) == 65
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("values", [["car"], {"car": 3}, {"merges": {"car": None}}])
def test_bad_merge_tables(
    place: Workplace, capsys: pytest.CaptureFixture[str], values: object
) -> None:
    assert place.run(merge="table", merge_table=place.write("table.json", values)) == 65
    assert "must map object names to representatives" in capsys.readouterr().err


@pytest.mark.parametrize("values", [["red"], {"head": "red"}, {"head": [3]}])
def test_bad_group_files(
    place: Workplace, capsys: pytest.CaptureFixture[str], values: object
) -> None:
    assert place.run(head_tail=place.write("head_tail.json", values)) == 65
    assert "must map each group to a list of names" in capsys.readouterr().err


def test_like_needs_a_root(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("--like", str(place.folder / "nothing")) == 65
    assert "give the root that clean, pack or merge wrote" in capsys.readouterr().err
    (place.folder / "broken").mkdir()
    place.write("broken/vocabulary.json", {"objects": []})
    (place.folder / "broken" / "feasible.npz").write_bytes(b"no archive")
    assert place.run("--like", str(place.folder / "broken")) == 65
    assert "feasible.npz cannot be read" in capsys.readouterr().err


def test_tools_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("clean", "pack", "merge", "verify", "inspect"))
    assert main(["polish"]) == 2
    assert "unknown tool 'polish'" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["clean", "--help"]) == 0
    assert "--clean.min_side  (default: 0.0)" in capsys.readouterr().out
    assert main(["clean", "--quick"]) == 2


def test_clean_never_imports_torch() -> None:
    code = "import sys, shard_tools.clean.program; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
