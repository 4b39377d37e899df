"""Damaged samples through whole runs: the same list on any ranks, kept, and bounded."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import damage, damaged_copy
from tests.training.test_runs import arguments, finish, lines, start, two_ranks
from vlal_dist.data.dataset import Dataset, open_dataset

pytestmark = pytest.mark.deepspeed

QUARANTINE = ("--data.damage", "quarantine", "--data.max_quarantined", "0.1")
EXACT = ("--data.epoch_end", "exact")
EPOCH_STEPS = 5  # 72 samples, 16 at a time


@pytest.fixture(scope="module")
def merged(small: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=small / "cache")


@pytest.fixture(scope="module")
def damaged(merged: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A root in which two samples have changed places; their uids, in hex."""
    root = tmp_path_factory.mktemp("damaged") / "merged"
    uids = damaged_copy(merged, root, "swapped").uids
    return root, {f"{uid:016x}" for uid in uids}


def state_of(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / f"checkpoints/{step:08d}/state.json").read_text())  # type: ignore[no-any-return]
