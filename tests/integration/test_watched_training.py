"""Prometheus scrapes two training ranks: queried values equal metrics.jsonl, a slow rank alarms."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.prometheus_server import (
    Prometheus,
    needs_prometheus,
    quick,
    running,
    wait_until,
)
from tests.fixtures.rank_processes import free_port
from tests.integration.test_training_runs import arguments, end, finish, lines, start

pytestmark = [needs_prometheus, pytest.mark.deepspeed, pytest.mark.slow]

EPOCHS = 1000  # until it is stopped: when Prometheus sees a target is not known
ROWS = 16 // 2  # of a rank in each step


def test_queried_values_equal_metrics_jsonl(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(quick(tmp_path)) as server:
        with two_ranks(small, run, tmp_path / "vlal") as ranks:
            wait_until_seen(server, ranks)
            ranks[1].send_signal(signal.SIGTERM)
            for one in ranks:
                finish(one, 75)

        def last(series: str, by: str = "rank") -> dict[str, float]:
            """The value at the last scrape, by a label."""
            found = server.query(f"last_over_time({series}[15m])")
            assert {one["metric"]["run"] for one in found} == {str(run)}
            return {one["metric"][by]: float(one["value"][1]) for one in found}

        steps = last("vlal_train_steps_total")
        assert set(steps) == {"0", "1"}
        # The last scrape may be from before the last steps, but is of one moment.
        trained = [line for line in lines(run) if line["kind"] == "train"]
        assert all(0 < count <= trained[-1]["step"] for count in steps.values())
        assert last("vlal_train_samples_total") == {
            rank: ROWS * count for rank, count in steps.items()
        }
        assert last("vlal_train_global_step") == steps
        shown = last("vlal_train_loss{term='total', rank='0'}")["0"]
        assert shown in [pytest.approx(line["loss"]) for line in trained]
        found = [line["mAP"] for line in lines(run) if line["kind"] == "validation"]
        shown = last("vlal_eval_map_ratio{group='overall', rank='1'}", by="group")["overall"]
        assert shown in [pytest.approx(value) for value in found]
        assert last("vlal_resume_total{kind='fresh'}") == {"0": 1.0, "1": 1.0}
        assert last("vlal_train_ledger_visits{kind='trained', rank='0'}")["0"] % (2 * ROWS) == 0
    assert list((tmp_path / "vlal").iterdir()) == []


def test_the_straggler_alert_names_the_slow_rank_only(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (
        running(quick(tmp_path)) as server,
        two_ranks(small, run, tmp_path / "vlal") as ranks,
    ):
        wait_until_seen(server, ranks)
        time.sleep(5)
        assert server.firing("VlalStragglerRank") == []

        def mean(part: str) -> dict[str, float]:
            """Seconds of a step, by rank."""
            rate = f"rate(vlal_train_{part}_seconds_{{}}[10s])"
            found = server.query(f"{rate.format('sum')} / {rate.format('count')}")
            return {one["metric"]["rank"]: float(one["value"][1]) for one in found}

        def ratio(part: str) -> float:
            """Rank 1's mean over rank 0's."""
            return mean(part)["1"] / mean(part)["0"]

        with slowed(ranks[1], times=5):
            wait_until(lambda: server.firing("VlalStragglerRank"), what="the alarm", seconds=120)
            (labels,) = server.firing("VlalStragglerRank")
            assert (labels["rank"], labels["run"]) == ("1", str(run))
            wait_until(lambda: ratio("compute") > 3, what="a rank three times as slow")
            assert ratio("allreduce") < 1  # who waits says it there
        assert all(rank.poll() is None for rank in ranks)


@contextlib.contextmanager
def two_ranks(small: Path, run: Path, targets: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks of a run that goes on until it is stopped; nothing of them stays."""
    port, ranks = str(free_port()), []
    more = ("--observability.targets", str(targets))
    more += ("--training.epochs", str(EPOCHS), "--model.width", "8")
    try:
        for rank in ("0", "1"):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks.append(start([sys.executable, *arguments(small, run, *more)], env))
        yield ranks
    finally:
        for one in ranks:
            end(one)


@contextlib.contextmanager
def slowed(process: subprocess.Popen[str], *, times: int) -> Iterator[None]:
    """Within the block the process stands still but for one part in so many."""
    done, part_s = threading.Event(), 0.01

    def hold() -> None:
        while not done.is_set():
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep((times - 1) * part_s)
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(part_s)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def wait_until_seen(server: Prometheus, ranks: list[subprocess.Popen[str]]) -> None:
    """Until Prometheus has scraped a validation of both ranks."""
    deadline = time.monotonic() + 200
    while True:
        found = server.query("vlal_eval_map_ratio{group='overall'}")
        if {one["metric"]["rank"] for one in found} == {"0", "1"}:
            return
        assert all(rank.poll() is None for rank in ranks), "a rank ended before it was seen"
        assert time.monotonic() < deadline, f"seen: {found}"
        time.sleep(0.2)
