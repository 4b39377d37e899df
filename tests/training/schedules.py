"""Runs that are stopped and started again: by SIGKILL, in the middle of a save, or by SIGTERM.

Processes are started by `deepspeed`, in a session of their own, as a user starts them.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.training.processes import free_port
from tests.training.test_runs import end, finish, start

EPOCHS, BATCH_SIZE = 3, 10
How = Literal["kill", "kill in save", "term"]


@dataclass(frozen=True)
class Cut:
    """A start that does not reach the end.

    Attributes:
        world_size: its ranks.
        how: `kill`: SIGKILL to all its processes once a step is logged; `kill in save`: once the
            folder of a checkpoint appears; `term`: SIGTERM to one rank, which makes all of them
            save and leave with 75.
        steps: how many steps further than any start before.
    """

    world_size: int
    how: How
    steps: int


@dataclass(frozen=True)
class Schedule:
    """Starts in order; the last one, on `last_world_size` ranks, reaches the end."""

    cuts: tuple[Cut, ...]
    last_world_size: int
    epoch_end: str
    checkpoint_steps: int = 1


def random_schedule(seed: int) -> Schedule:
    """Two to four cuts, on one or two ranks each, at random steps in random ways."""
    rng = random.Random(seed)
    cuts = tuple(
        Cut(rng.choice((1, 2)), rng.choice(("kill", "kill", "kill in save", "term")), steps)
        for steps in rng.choices(range(1, 6), k=rng.randint(2, 4))
    )
    return Schedule(cuts, rng.choice((1, 2)), rng.choice(("drop", "exact")), rng.choice((1, 2)))


@dataclass
class Record:
    """What a schedule left behind.

    Attributes:
        books: (step, epoch, ledger) of each log line and of each whole checkpoint that any start
            wrote, those that a restart took back included.
        resumed_at: for each start but the first, the step of the checkpoint that it found.
        lines: of `metrics.jsonl` in the end.
    """

    books: list[tuple[int, int, dict[str, int]]]
    resumed_at: list[int]
    lines: list[dict[str, Any]]


def train(small: Path, run: Path, schedule: Schedule) -> Record:
    """Carry a schedule out."""
    record, began = Record([], [], []), 0
    for cut in schedule.cuts:
        after = furthest(run) + cut.steps
        stop(launch(small, run, schedule, cut.world_size), run, cut, after=after)
        record.books += read_books(run, after=began)
        began = last_checkpoint(run, "COMPLETE")
        record.resumed_at.append(began)
    output = finish(launch(small, run, schedule, schedule.last_world_size))
    assert not began or f"step {began}, epoch" in output
    record.books += read_books(run, after=began)
    record.lines = whole_lines(run)
    return record


def launch(small: Path, run: Path, schedule: Schedule, ranks: int) -> subprocess.Popen[str]:
    """One start under `deepspeed`."""
    settings = {
        "paths.run": run,
        "data.epoch_end": schedule.epoch_end,
        "training.epochs": EPOCHS,
        "training.batch_size": BATCH_SIZE,
        "training.log_steps": 1,
        "training.checkpoint_steps": schedule.checkpoint_steps,
        "observability.metrics": "false",
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    program = str(Path(sys.executable).parent / "deepspeed")
    command = [program, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    command += ["vlal_dist/train.py", "--config", str(small / "config.yaml"), *flags]
    return start(command, {})


def stop(process: subprocess.Popen[str], run: Path, cut: Cut, *, after: int) -> None:
    """Wait for a step, and end the start as its cut says."""
    reached = last_checkpoint if cut.how == "kill in save" else last_logged
    try:
        wait_until(process, lambda: reached(run) >= after)
        if cut.how != "term":
            return
        os.kill(rank_process(process.pid, cut.world_size - 1), signal.SIGTERM)
        finish(process, code=75)
    finally:
        end(process)


def wait_until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the step was not reached"
        time.sleep(0.02)


def rank_process(group: int, rank: int) -> int:
    """The process of a rank among those of a launcher."""
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if os.getpgid(int(folder.name)) != group:
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if b"RANK=%d" % rank in variables:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def whole_lines(run: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl`, without a line that a kill cut in two."""
    log = run / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_logged(run: Path) -> int:
    return max((line["step"] for line in whole_lines(run)), default=0)


def last_checkpoint(run: Path, file: str = "") -> int:
    """Step of the newest checkpoint, whole or not, or of the newest that has a file; 0: none."""
    names = [path.relative_to(run).parts[1] for path in run.glob(f"checkpoints/*/{file}")]
    return max((int(name.partition("-")[0]) for name in names), default=0)


def furthest(run: Path) -> int:
    """The step that any start so far left a trace of, taken back or not."""
    return max(last_logged(run), last_checkpoint(run))


def read_books(run: Path, *, after: int) -> list[tuple[int, int, dict[str, int]]]:
    """Step, epoch and running ledger of what was written of later steps: lines and checkpoints."""
    books = [
        (line["step"], line["epoch"], line["ledger"])
        for line in whole_lines(run)
        if line["kind"] == "train"
    ]
    for mark in run.glob("checkpoints/*/COMPLETE"):
        state = json.loads((mark.parent / "state.json").read_text())
        if state["consumed"]:  # else it stands before its epoch's first step
            books.append((state["step"], state["epoch"], state["ledger"]))
    return [book for book in books if book[0] > after]
