"""`clean.hide` from command line to files: what is derived, what is named, and who may look."""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shard_tools.clean.hide import HIDDEN
from shard_tools.clean.vocabulary import prevalence_by_count
from tests.fixtures.scored_dataset import write_scores
from tests.fixtures.tiny_vaw import run, write_small_vaw
from tests.shard_tools.clean.test_program import Workplace, record
from tests.shard_tools.test_pack import tree
from tests.test_architecture import ROOT, imports, modules
from vlal_dist.method.feasible import FeasibleSets

COLORS = tuple(f"c{n:02d}" for n in range(18))
SHAPES = tuple(f"s{n}" for n in range(9))
DENSE = [
    record(
        n, ("car", "bus", "bike")[n % 3], [COLORS[(n + k) % 18] for k in range(n % 10)], [*SHAPES]
    )
    for n in range(60)
]
HIDE = {"hide": "vaw_density", "hide_seed": 7}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    place = Workplace(tmp_path)
    place.write("a.json", DENSE)
    place.write("b.json", [record(90 + n, "car", [*COLORS], [*SHAPES, "new"]) for n in range(4)])
    return place


def rows(place: Workplace, name: str, root: str = "out") -> list[dict[str, Any]]:
    return list(pq.read_table(place.folder / root / name).to_pylist())


def root(place: Workplace, name: str) -> list[str]:
    return ["--paths.instances", str(place.folder / name)]


def test_everything_is_derived_from_what_is_kept(place: Workplace) -> None:
    assert place.run() == 0
    assert place.run(*root(place, "sparse"), "--json", str(place.folder / "c.json"), **HIDE) == 0
    whole, sparse = rows(place, "train.parquet"), rows(place, "train.parquet", "sparse")
    before, after = place.json("vocabulary.json"), place.json("vocabulary.json", "sparse")
    assert after["digest"] == before["digest"]  # names are not hidden

    pairs: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    positives = dict.fromkeys(after["attributes"], 0)
    for row in sparse:
        pairs[row["object_id"]] |= {*row["positive"], *row["negative"]}
        for attribute in row["positive"]:
            positives[after["attributes"][attribute]] += 1
    data = (place.folder / "sparse" / "feasible.npz").read_bytes()
    feasible = FeasibleSets.from_npz(data)
    assert [set(feasible.of(i)) for i in range(3)] == [pairs[i] for i in range(3)]
    num_positive, num_negative = (sum(len(r[p]) for r in sparse) for p in ("positive", "negative"))
    assert feasible.positive_count.sum() == num_positive
    assert feasible.negative_count.sum() == num_negative
    full = FeasibleSets.from_npz((place.folder / "out" / "feasible.npz").read_bytes())
    assert len(feasible.indices) < len(full.indices)
    assert all(set(feasible.of(i)) <= set(full.of(i)) for i in range(3))
    assert tuple(after["prevalence"]) == prevalence_by_count(after["attributes"], positives)
    assert after["prevalence"] != before["prevalence"]

    counts = after["counts"]["hide"]
    assert counts["train_positive_annotations"] == counts["kept_positives"] == num_positive
    assert counts["train_negative_annotations"] == counts["kept_negatives"] == num_negative
    assert counts["hidden_positives"] == sum(len(r["positive"]) for r in whole) - num_positive
    assert list(after["counts"]) == [*list(before["counts"])[:-1], "hide", "feasible"]
    counted = json.loads((place.folder / "c.json").read_text())
    assert {name: counted[name] for name in counts if "kept" in name or "hidden" in name} == {
        name: value for name, value in counts.items() if "kept" in name or "hidden" in name
    }


def test_kept_and_hidden_are_all_and_the_other_splits_are_whole(place: Workplace) -> None:
    assert place.run() == 0
    assert place.run(*root(place, "sparse"), **HIDE) == 0
    whole, sparse = rows(place, "train.parquet"), rows(place, "train.parquet", "sparse")
    hidden = rows(place, HIDDEN, "sparse")
    assert list(hidden[0]) == ["instance_id", "positive", "negative"]
    for before, left, away in zip(whole, sparse, hidden, strict=True):
        assert before["instance_id"] == left["instance_id"] == away["instance_id"]
        for polarity in ("positive", "negative"):
            assert sorted(left[polarity] + away[polarity]) == before[polarity]
    assert place.digests("sparse")["test.parquet"] == place.digests()["test.parquet"]
    listed = place.json("clean.json", "sparse")["files"]
    data = (place.folder / "sparse" / HIDDEN).read_bytes()
    assert listed[HIDDEN] == hashlib.sha256(data).hexdigest()
    assert not (place.folder / "out" / HIDDEN).exists()


def test_same_bytes_again_and_the_same_labels_in_another_order(place: Workplace) -> None:
    assert place.run(**HIDE) == 0
    assert place.run(*root(place, "again"), **HIDE) == 0
    assert tree(place.folder / "again") == tree(place.folder / "out")
    place.write("a.json", DENSE[::-1])
    assert place.run(*root(place, "back"), **HIDE) == 0
    for name in ("feasible.npz", "vocabulary.json"):
        assert place.digests("back")[name] == place.digests()[name]
    for name in ("train.parquet", HIDDEN):
        assert rows(place, name, "back")[::-1] == rows(place, name)


def test_the_digests_cover_rule_and_seed_even_where_nothing_is_hidden(place: Workplace) -> None:
    place.write("a.json", [record(n, "car", ["red"], []) for n in range(3)])
    settings: list[dict[str, object]] = [{}, {**HIDE, "hide_seed": 0}, HIDE]
    for number, hide in enumerate(settings):
        assert place.run(*root(place, str(number)), **hide) == 0
    digests = [place.digests(str(number)) for number in range(3)]
    assert len({one["train.parquet"] for one in digests}) == 1
    for name in ("vocabulary.json", "clean.json"):  # pack's dataset.json holds the former's sha256
        assert len({one[name] for one in digests}) == 3
    assert place.run(*root(place, "0"), hide_seed=9) == 0  # a seed without a rule says nothing


def test_another_seed_does_not_fit_into_a_finished_root(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run(**HIDE) == 0
    before = tree(place.folder / "out")
    assert place.run(**{**HIDE, "hide_seed": 8}) == 65
    assert "already holds other bytes" in capsys.readouterr().err
    assert tree(place.folder / "out") == before


def test_without_hiding_the_bytes_are_unchanged(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    assert place.run() == 0
    # Of the tree before this option existed; tables by content, for pyarrow's bytes may change.
    assert place.digests()["vocabulary.json"] == (
        "acafe907d7b0c11546bf1cb2892c32ba4cfb99283d95f3e853dba04b2ffff0ee"
    )
    manifest = place.json("clean.json")
    assert manifest["feasible_digest"] == (
        "2e3bf10a5201d3f70798e0d9c601d8fe71333635ddcb76769e11f49489dd466f"
    )
    assert list(manifest) == [
        "format", "vocabulary_digest", "feasible_digest", "records", "splits", "rejected",
        "clashes", "counts", "files",
    ]  # fmt: skip
    contents = {
        split: hashlib.sha256(json.dumps(rows(place, f"{split}.parquet")).encode()).hexdigest()
        for split in ("train", "test")
    }
    assert contents == {
        "train": "71e8dc1a83cf2b31dbfdce5300e7f3bd1c96499d131da28b6cde31f2c74c486f",
        "test": "8cced6f57b6b0c6a7dfb4e13a78c0e9ff8acf9b522a5258b4fc7210bd3bf2d0a",
    }


def test_like_a_root_that_hides_otherwise_is_refused(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run() == 0
    assert place.run(*root(place, "sparse"), **HIDE) == 0
    whole, sparse = (["--like", str(place.folder / name)] for name in ("out", "sparse"))
    assert place.run(*whole, *root(place, "a"), **HIDE) == 64
    assert "clean.hide none, this is clean.hide vaw_density with seed 7" in capsys.readouterr().err
    assert place.run(*sparse, *root(place, "a"), **{**HIDE, "hide_seed": 8}) == 64
    assert "clean.hide vaw_density with seed 7, this is" in capsys.readouterr().err
    assert not (place.folder / "a" / "vocabulary.json").exists()
    # The same rule gives the same labels; whole labels may be trained on in sparse feasible sets.
    assert place.run(*sparse, *root(place, "same"), **HIDE) == 0
    assert place.run(*sparse, *root(place, "more")) == 0
    for name, labels in (("same", "sparse"), ("more", "out")):
        assert place.digests(name)["train.parquet"] == place.digests(labels)["train.parquet"]
        assert place.digests(name)["feasible.npz"] == place.digests("sparse")["feasible.npz"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hide": "vaw"}, "clean.hide: Input should be 'none' or 'vaw_density'"),
        ({"hide_seed": -1}, "clean.hide_seed: Input should be greater than or equal to 0"),
        ({"expected": {"hide": {"kept": 3}}}, "count 'kept'; known are instances"),
    ],
)
def test_wrong_settings(
    place: Workplace, capsys: pytest.CaptureFixture[str], settings: dict[str, object], message: str
) -> None:
    assert place.run(**settings) == 64
    assert message in capsys.readouterr().err


def test_the_hidden_labels_change_no_byte_of_what_is_trained_on(tmp_path: Path) -> None:
    """Training and evaluation read the merged root alone, whose bytes are compared here."""
    found = {}
    for name in ("with", "without"):
        folder = tmp_path / name
        config = write_small_vaw(folder, images={"train": 6, "val": 2, "test": 2})
        assert run("clean", config, "--clean.hide", "vaw_density") == 0
        hidden = folder / "instances" / HIDDEN
        assert any(row["negative"] for row in pq.read_table(hidden).to_pylist())
        if name == "without":
            hidden.unlink()
        assert run("pack", config, "--pack.workers", "1") == 0
        write_scores(folder)
        assert run("merge", config, "--pack.workers", "1") == 0
        found[name] = {part: tree(folder / part) for part in ("dataset", "scores", "merged")}
    assert found["with"] == found["without"]
    assert not any(HIDDEN in path for path in found["with"]["merged"])


def lookers(root: Path) -> list[str]:
    """Modules that could name the file of hidden labels: by its name, or through its writer."""
    writer = "shard_tools.clean.hide"
    known = [(name, path) for name, path in modules(root) if name != writer]
    known += [(path.stem, path) for path in sorted((root / "benchmarks").rglob("*.py"))]
    bad = []
    for name, path in known:
        text = path.read_text(encoding="utf-8")
        constants = {
            node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)
        }
        says = any(isinstance(one, str) and "hidden.parquet" in one for one in constants)
        taken = {one for one in imports(path) if one.startswith(writer)}
        may = name in (
            "shard_tools.clean.program",
            "shard_tools.clean.steps",
            "shard_tools.clean.program",
        )
        if says or f"{writer}.HIDDEN" in taken or (taken and not may):
            bad.append(name)
    return bad


def test_only_the_writer_names_the_file() -> None:
    assert HIDDEN == "hidden.parquet"
    assert lookers(ROOT) == []


def test_the_test_of_names_can_fail(tmp_path: Path) -> None:
    for name, text in (
        ("vlal_dist/train.py", "PATH = f'{1}/hidden.parquet'\n"),
        ("shard_tools/pack.py", "def f():\n    from shard_tools.clean.hide import hide_labels\n"),
        ("shard_tools/clean/program.py", "from shard_tools.clean.hide import HIDDEN\n"),
        ("shard_tools/clean/steps.py", "from shard_tools.clean.hide import hide_labels\n"),
        ("benchmarks/peek.py", "import shard_tools.clean.hide\n"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "shard_tools/clean/hide.py").write_text("HIDDEN = 'hidden.parquet'\n")
    assert lookers(tmp_path) == [
        "vlal_dist.train",
        "shard_tools.clean.program",
        "shard_tools.pack",
        "peek",
    ]
