"""The run card shows what the run left behind, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlal_dist.data.format.label_figures import LabelFigures
from vlal_dist.errors import DataError
from vlal_dist.reporting.run_card import (
    Line,
    RunFiles,
    parse_lines,
    read_run_files,
    run_card,
    samples_seen,
    series,
)
from vlal_dist.storage.store import open_store

START: Line = {
    "step": 0,
    "version": "1.2",
    "commit": "abc",
    "torch": "2.9",
    "device": "A GPU",
    "ranks": 4,
    "threads": 2,
    "cores": 8,
    "kernel": "cuda",
}
RESULT: dict[str, Any] = {
    "dataset": {"name": "tiny", "digest": "0123456789abcdef0"},
    "split": "test",
    "num_samples": 9,
    "num_positive": 1234,
    "num_negative": 5,
    "model": None,
}
MANIFEST = {"splits": {"train": {"samples": 10_000, "rejected": 2}, "test": {"samples": 9}}}


def card(**given: Any) -> dict[str, str]:
    return dict(run_card(RESULT, MANIFEST, RunFiles(**given)))


def train(epoch: int, step: int, count: int) -> Line:
    return {
        "kind": "train",
        "epoch": epoch,
        "step": step,
        "loss": 1.0,
        "quarantined": 3,
        "ledger": {"count": count, "sum": 1},
    }


def test_without_training_only_the_data_is_described() -> None:
    assert card() == {
        "Dataset": "tiny",
        "Dataset digest": "0123456789ab",
        "Crops": "train 10,000, test 9",
        "Rejected at packing": "2",
        "Evaluated": "test: 9 crops",
        "Labels": "1,234 positive, 5 negative",
    }


def test_the_density_of_the_training_labels() -> None:
    found = LabelFigures(samples=10, positive=30, negative=10, feasible=1000, annotated=40)
    assert dict(run_card(RESULT, MANIFEST, RunFiles(), trained=found))["Training labels"] == (
        "4.0 per crop; feasible sets of 100.0 attributes on average, 96.0 % of them unannotated; a "
        "NUM_IGNORE of at most 25 leaves three quarters to the loss"
    )


def test_samples_are_summed_over_epochs() -> None:
    lines = [train(0, 1, 64), train(0, 2, 128), train(1, 3, 64), {"kind": "validation"}]
    assert samples_seen(lines) == 192
    assert samples_seen([{"kind": "train", "step": 1, "loss": 1.0}]) is None
    shown = card(lines=lines)
    assert shown["Trained"] == "3 steps" and shown["Quarantined"] == "3"
    assert shown["Samples seen"].startswith("192 crops")


def test_hardware_of_every_start_and_the_time_of_the_last() -> None:
    finished = {"code": 0, "counts": {"seconds": 3725.2}}
    shown = card(starts=[START], finished=finished)
    assert shown["Hardware"].startswith("A GPU, 4 ranks with 2 threads")
    assert shown["Software"] == "vlal_dist 1.2 (abc), torch 2.9, loss by cuda"
    assert shown["Wall time of training"] == "1 h 2 min"
    resumed = {**START, "step": 50, "device": "a CPU", "commit": None, "ranks": 1, "threads": 1}
    shown = card(starts=[START, START, resumed], finished={"code": 0, "counts": {"seconds": 61}})
    assert (
        shown["Hardware"].count("A GPU") == 1
        and "; then a CPU, 1 rank with 1 thread;" in shown["Hardware"]
    )
    assert shown["Wall time of training"] == "1 min 1 s, of the last of 3 starts (from step 50)"
    assert "ended with code 75" in card(finished={"code": 75, "reason": "x"})["Wall time"]


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert read_run_files(store) == RunFiles(lines=[], starts=[])
    for text in (b"{", b"[]"):
        store.replace("train.result.json", text)
        with pytest.raises(DataError, match=r"train\.result\.json is"):
            read_run_files(store)


def test_series_by_kind_the_later_line_wins_and_values_that_are_not_numbers_are_left_out() -> None:
    text = "\n".join(
        json.dumps(line)
        for line in (
            {"kind": "train", "step": 20, "loss": 5.0, "ignored_effective": 3.5},
            {"kind": "validation", "epoch": 1, "step": 30, "mAP": 0.25},
            {"kind": "train", "step": 10, "loss": 9.0},
            {"kind": "train", "step": 20, "loss": 4.0},
            {"kind": "train", "step": 30, "loss": float("nan")},
            {"kind": "train", "step": 40},
        )
    )
    lines = parse_lines(text, where="m")
    assert series(lines, "train", "loss") == [(10, 9), (20, 4)]
    assert series(lines, "validation", "mAP") == [(30, 0.25)]
    assert series(lines, "train", "ignored_effective") == [(20, 3.5)]


def test_a_cut_last_line_is_left_out_another_is_an_error() -> None:
    assert parse_lines('{"a": 1}\n{"b": ', where="m") == [{"a": 1}]
    assert parse_lines("", where="m") == []
    with pytest.raises(DataError, match="m, line 1"):
        parse_lines('{"b": \n{"a": 1}\n', where="m")
    with pytest.raises(DataError, match="Input should be an object"):
        parse_lines("[1]\n{}\n", where="m")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.result.json", '{"code": 0, "counts": 3}'),
        ("train.result.json", '{"code": 0, "counts": {"seconds": {}}}'),
        ("starts.jsonl", '{"step": "many"}\n{"step": 1}\n'),
    ],
)
def test_a_file_with_values_of_other_types_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        read_run_files(open_store(str(tmp_path)))
