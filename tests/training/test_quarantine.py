"""Quarantine of damaged samples: the same on any number of ranks, kept at a resume, bounded."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.damaged_tars import Damaged, damaged_copy
from tests.integration.test_training_runs import arguments, finish, launch, lines, start, two_ranks
from vlal_dist.data.format.dataset import Dataset, open_dataset

pytestmark = pytest.mark.deepspeed

QUARANTINE = ("--data.damage", "quarantine", "--data.max_quarantined", "0.1")
"""Up to 7 of the 72 samples."""
STEPS = 5
"""Of an epoch that keeps its end: 72 samples, 16 at a time."""
LEDGER = "ledger equals the plan: 70 visits trained on, 2 left out"


@pytest.fixture(scope="module")
def merged(small: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=small / "cache")


def options(root: Path, *more: str) -> tuple[str, ...]:
    return ("--paths.merged", str(root), "--data.epoch_end", "exact", *QUARANTINE, *more)


def quarantined(run: Path, step: int) -> dict[str, str]:
    state = json.loads((run / f"checkpoints/{step:08d}/state.json").read_text())
    found: dict[str, str] = state["quarantined"]
    return found


def train_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if line["kind"] == "train"]


@pytest.mark.slow
def test_one_and_two_ranks_quarantine_the_same_and_a_resume_keeps_it(
    small: Path, merged: Dataset, tmp_path: Path
) -> None:
    root, one, two = tmp_path / "merged", tmp_path / "one", tmp_path / "two"
    damaged = damaged_copy(merged, root, "swapped")
    first = options(root, "--training.max_steps", str(STEPS))
    outputs = [
        finish(start([sys.executable, *arguments(small, one, *first)], {})),
        finish(launch(small, two, *first)),
    ]
    for run, output in zip((one, two), outputs, strict=True):
        check_list(quarantined(run, STEPS), damaged)
        last = train_lines(run)[-1]
        assert (last["quarantined"], last["ledger"]["count"]) == (2, 70)
        assert LEDGER in output
    assert quarantined(one, STEPS) == quarantined(two, STEPS)

    # The shard is restored, but a quarantined sample stays out to the end of the run.
    shutil.rmtree(root)
    shutil.copytree(merged.url, root)
    output = finish(start([sys.executable, *arguments(small, two, *options(root))], {}))
    assert f"resuming {two}" in output and "quarantined sample" not in output
    assert LEDGER in output
    assert quarantined(two, 2 * STEPS) == quarantined(two, STEPS)
    assert train_lines(two)[-1]["quarantined"] == 2


def check_list(found: dict[str, str], damaged: Damaged) -> None:
    """Every uid, where it is, and what is wrong with it."""
    assert found.keys() == {f"{uid:016x}" for uid in damaged.uids}
    assert all(damaged.key in why and "crc32" in why for why in found.values())


@pytest.mark.slow
def test_more_than_max_quarantined_stops_all_ranks(
    small: Path, merged: Dataset, tmp_path: Path
) -> None:
    damaged = damaged_copy(merged, tmp_path / "merged", "other_shard")
    run = tmp_path / "run"
    outputs = two_ranks(small, run, *options(tmp_path / "merged"))
    for output in outputs:
        assert "samples are damaged, data.max_quarantined 0.1 allows 7: uid" in output
        (message,) = (line for line in output.splitlines() if "allows 7: uid" in line)
        assert 1 <= sum(f"{uid:016x}" in message for uid in damaged.uids) <= 5
        assert f"{damaged.key}: " in message and "vlal verify" in message
    assert json.loads((run / "train.result.json").read_text())["code"] == 65
