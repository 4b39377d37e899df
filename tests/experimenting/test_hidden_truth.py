"""Ignored pairs against hidden truth; the benchmark program against a slow recount."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks.hidden_truth.hidden_truth import CHANCE, TABLES, WAYS, main
from shard_tools.clean.hide import HIDDEN
from tests.fixtures.scored_dataset import write_scores
from tests.fixtures.tiny_dataset import VOCABULARY, make_instances
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.sample_reader import Sample, SampleReader
from vlal_dist.errors import DataError
from vlal_dist.experimenting.hidden_truth import (
    HiddenCount,
    count_hidden_truth,
    join_hidden,
    read_hidden_truth,
)
from vlal_dist.method.ignore_set import draw_keys

SEED, VISITS, NUM_IGNORES = 7, 3, (1, 3)
IDS = pa.list_(pa.uint32())
SCHEMA = pa.schema([("instance_id", pa.string()), ("positive", IDS), ("negative", IDS)])


@st.composite
def cases(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shape = (draw(st.integers(0, 6)), draw(st.integers(1, 6)))
    drawn, feasible = (draw(arrays.arrays(np.bool_, shape)) for _ in range(2))
    sign = st.sampled_from([-1, 0, 1])
    label, truth = (draw(arrays.arrays(np.int8, shape, elements=sign)) for _ in range(2))
    return drawn, feasible, label, truth


def slow_count(drawn: Any, feasible: Any, label: Any, truth: Any) -> HiddenCount:
    count = HiddenCount(crops=len(label), ignored=0, known=0, positive=0, hidden=0)
    for place in np.ndindex(label.shape):
        if not feasible[place] or label[place] != 0:
            continue
        count = replace(count, hidden=count.hidden + int(truth[place] == 1))
        if drawn[place]:
            count = replace(
                count,
                ignored=count.ignored + 1,
                known=count.known + int(truth[place] != 0),
                positive=count.positive + int(truth[place] == 1),
            )
    return count


@given(cases())
@settings(deadline=None, max_examples=200)
def test_counts_are_those_of_a_walk_over_all_pairs(case: Any) -> None:
    drawn, feasible, label, truth = case
    found = count_hidden_truth(drawn, feasible=feasible, label=label, truth=truth)
    assert found == slow_count(*case)
    assert found.positive <= found.known <= found.ignored
    for share, part, whole in (
        (found.positive_share, found.positive, found.known),
        (found.hidden_share, found.positive, found.hidden),
        (found.known_share, found.known, found.ignored),
        (found.per_crop, found.ignored, found.crops),
    ):
        assert math.isnan(share) if whole == 0 else share == part / whole


@given(cases())
@settings(deadline=None, max_examples=100)
def test_a_draw_and_what_it_left_make_chance(case: Any) -> None:
    drawn, feasible, label, truth = case
    some, rest, all_ = (
        count_hidden_truth(one, feasible=feasible, label=label, truth=truth)
        for one in (drawn, ~drawn, feasible)
    )
    assert all_.positive == all_.hidden == some.positive + rest.positive
    assert (all_.known, all_.ignored) == (some.known + rest.known, some.ignored + rest.ignored)


def hidden_table(rows: list[tuple[str, list[int], list[int]]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(SCHEMA.names, map(list, columns), strict=True)), schema=SCHEMA)


def test_hidden_labels_join_by_instance() -> None:
    table = hidden_table([("a", [2], [0, 3]), ("b", [], []), ("c", [0, 1], [3])])
    found = join_hidden(table, pa.array(["c", "a"]), label=np.zeros((2, 4), np.int8), where="t")
    assert found.dtype == np.int8
    assert found.tolist() == [[1, 1, 0, -1], [-1, 0, 1, -1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", [1], [])], "lacks 1 of 2 instances, first 'b'"),
        ([("a", [], []), ("b", [], []), ("a", [1], [])], "twice"),
        ([("a", [4], []), ("b", [], [])], "attribute 4 of 4"),
        ([("a", [], []), ("b", [0], [2])], "1 of its labels are annotated in the dataset too"),
    ],
)
def test_hidden_labels_of_another_dataset_are_refused(
    rows: list[tuple[str, list[int], list[int]]], message: str
) -> None:
    label = np.array([[0, 0, 1, 0], [-1, 0, 0, 0]], np.int8)
    with pytest.raises(DataError, match=message):
        join_hidden(hidden_table(rows), pa.array(["a", "b"]), label=label, where="t")


def test_complete_and_hidden_labels_are_recognised_by_their_columns(
    dataset: Dataset, truth_file: Path, tmp_path: Path
) -> None:
    instances, path = make_instances(), tmp_path / "some.parquet"
    whole = read_hidden_truth(str(truth_file), dataset, "test")
    assert [np.flatnonzero(row == 1).tolist() for row in whole] == [i.present for i in instances]
    assert set(whole.ravel().tolist()) == {-1, 1}
    rows = []
    for one in instances:
        free = set(range(len(VOCABULARY.attributes))) - {*one.positive, *one.negative}
        away = sorted(free)[:2]
        rows.append(
            (
                one.instance_id,
                [a for a in away if a in one.present],
                sorted({*away} - {*one.present}),
            )
        )
    pq.write_table(hidden_table(rows[::-1]), path)
    part = read_hidden_truth(str(path), dataset, "test")
    for row, (_, positive, negative) in zip(part, rows, strict=True):
        assert np.flatnonzero(row == 1).tolist() == positive
        assert np.flatnonzero(row == -1).tolist() == negative
    assert np.array_equal(part[part != 0], whole[part != 0])


def test_other_files_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "other"
    pq.write_table(hidden_table([("a", [1], [])]).drop(["negative"]), path)
    with pytest.raises(DataError, match="clean\\.hide writes"):
        read_hidden_truth(str(path), dataset, "test")
    path.write_text("text")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_hidden_truth(str(path), dataset, "test")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset with hidden labels, merged."""
    folder = tmp_path_factory.mktemp("hidden") / "small"
    config = write_small_vaw(folder)
    assert run("clean", config, "--clean.hide", "vaw_density") == 0
    run_all(config, ["pack"])
    write_scores(folder)
    run_all(config, ["merge"])
    return folder


def slow_drawn(
    sample: Sample, dataset: Dataset, *, weights: str, draw: str, number: int, visit: int
) -> set[int]:
    """One ignore set over all feasible attributes, in plain Python."""
    members = dataset.feasible.of(sample.object_id).tolist()
    start = int(dataset.feasible.indptr[sample.object_id])
    present = dataset.feasible.positive_count[start : start + len(members)]
    assert sample.log_likelihood is not None
    weight = {
        "likelihood": np.exp(sample.log_likelihood.astype(np.float64)),
        "uniform": np.ones(len(members)),
        "cooccurrence": present + 1.0,
    }[weights]
    clock = np.ones(len(dataset.vocabulary.attributes))
    if draw == "random":
        clock = draw_keys(
            uid=torch.from_numpy(np.array([sample.uid], np.uint64).view(np.int64)),
            visit=torch.tensor([visit]),
            seed=SEED,
            num_attributes=len(clock),
        )[0].numpy()
    finish = {a: float(clock[a]) / g for a, g in zip(members, weight.tolist(), strict=True)}
    return set(sorted(finish, key=lambda a: (finish[a], a))[:number])


def slow_way(folder: Path, cache: Path, **way: Any) -> HiddenCount:
    """One visit of one way, crop by crop; without a way, every feasible attribute is ignored."""
    dataset = open_dataset(str(folder / "merged"), cache=cache)
    split = open_split(dataset, "train")
    hidden = {r["instance_id"]: r for r in pq.read_table(folder / "instances" / HIDDEN).to_pylist()}
    reader, total = SampleReader(split), np.zeros(4, np.int64)
    for row in range(split.num_samples):
        sample = reader.read(row)
        free = {*dataset.feasible.of(sample.object_id).tolist()}
        free -= {*sample.positive, *sample.negative}
        ignored = free & slow_drawn(sample, dataset, **way) if way else free
        present = {*hidden[sample.instance_id]["positive"]}
        known = present | {*hidden[sample.instance_id]["negative"]}
        counted = (ignored, ignored & known, ignored & present, free & present)
        total += [len(one) for one in counted]
    return HiddenCount(split.num_samples, *total.tolist())


def program(folder: Path, *arguments: str, truth: Path | None = None) -> None:
    given = truth or folder / "instances" / HIDDEN
    seed = ("--training.seed", str(SEED))
    main(["--config", str(folder / "config.yaml"), "--truth", str(given), *seed, *arguments])


def test_the_program_prints_what_a_slow_recount_finds(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, cache = tmp_path / "table.md", tmp_path / "cache"
    numbers = ("--num-ignore", *map(str, NUM_IGNORES))
    program(sparse, "--visits", str(VISITS), *numbers, "--markdown", str(path))
    text = path.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text + "\n"
    chance = slow_way(sparse, cache)
    assert 0 < chance.hidden < chance.known < chance.ignored  # the data separates the ways
    counts = {
        (name, number): [
            slow_way(sparse, cache, weights=weights, draw=draw, number=number, visit=visit)
            for visit in range(VISITS if draw == "random" else 1)
        ]
        for name, weights, draw in WAYS
        for number in NUM_IGNORES
    }
    expected = []
    for _, measure in TABLES:
        expected.append([CHANCE, *[f"{measure(chance):.1f}"] * len(NUM_IGNORES)])
        for name, _, draw in WAYS:
            cells = []
            for number in NUM_IGNORES:
                values = [measure(one) for one in counts[name, number]]
                spread = f" ± {statistics.stdev(values):.2f}" if draw == "random" else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            expected.append([name, *cells])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    names = {CHANCE, *(name for name, _, _ in WAYS)}
    assert [line for line in lines if line and line[0] in names] == expected


def test_the_program_draws_over_the_configured_set(
    sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over unannotated attributes alone no place is lost: more are ignored."""
    ignored = []
    for over in ("feasible", "unannotated"):
        program(sparse, "--num-ignore", "2", "--visits", "1", "--method.draw_over", over)
        text = capsys.readouterr().out
        assert f"method.draw_over {over}" in text
        table = text.split(TABLES[2][0])[1]
        line = next(line for line in table.splitlines() if line.startswith(f"| {WAYS[2][0]}"))
        ignored.append(float(line.split("|")[2]))
    assert ignored[0] < ignored[1] <= 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--visits", "0"), 2, "1 or more"),
        (("--method.draw_ovr", "feasible"), 64, "method.draw_over"),
    ],
)
def test_the_program_explains_its_refusals(
    sparse: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program(sparse, *arguments)
    assert stopped.value.code == code and message in capsys.readouterr().err


def test_the_program_needs_what_merge_wrote(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program(sparse, "--paths.merged", str(sparse / "dataset"))
    assert stopped.value.code == 65 and "vlal merge" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        program(sparse, truth=tmp_path / "none.parquet")
    assert stopped.value.code == 74 and "none.parquet" in capsys.readouterr().err
