"""A Prometheus with the shipped files scrapes ranks: every panel has data, a killed rank alarms."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fixtures.prometheus_server import (
    ROOT,
    WATCHED,
    Prometheus,
    expressions,
    needs_prometheus,
    quick,
    rules,
    running,
    wait_until,
)
from tests.fixtures.rank_exporter import ROWS, Exporter
from tests.fixtures.rank_processes import free_port
from vlal_dist.observability.prometheus_files import Target

pytestmark = needs_prometheus


class Watched(NamedTuple):
    """A server, a rank 0 in this process, a rank 1 in one of its own."""

    server: Prometheus
    rank_0: Exporter
    target_0: Target
    rank_1: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("prometheus")
    config = quick(folder)
    exporter, done = Exporter(), threading.Event()
    exporter.begin()
    exporter.step()
    exporter.rarely()
    target = Target(folder / "vlal", run="r", role="train", rank=0)
    port = exporter.metrics.serve(host="127.0.0.1", port=free_port())
    assert port is not None
    target.write(host="127.0.0.1", port=port)

    def work() -> None:
        while not done.wait(0.2):
            exporter.step()

    thread = threading.Thread(target=work)
    other = subprocess.Popen(
        [sys.executable, "-m", "tests.fixtures.rank_exporter", str(folder / "vlal"), "1"],
        cwd=ROOT,
    )
    try:
        thread.start()
        with running(config) as server:
            # Rates need two scrapes of both.
            moving = 'count(rate(vlal_train_steps_total{run="r"}[10s]) > 0) == 2'
            wait_until(lambda: server.query(moving), what="two ranks are scraped")
            yield Watched(server, exporter, target, other)
    finally:
        done.set()
        thread.join()
        exporter.metrics.close()
        other.kill()
        other.wait()


def test_totals_are_the_ranks_own(watched: Watched) -> None:
    own = "vlal_train_samples_total{rank='0'}"
    before = watched.rank_0.steps
    (found,) = watched.server.query(own)
    steps = float(found["value"][1]) / ROWS
    # What was scraped lies at most some seconds (of five steps each) behind.
    assert 0 < steps <= watched.rank_0.steps and steps > before - 60
    assert found["metric"]["run"] == "r" and found["metric"]["job"] == "vlal"
    assert {"role", "node", "instance"} <= set(found["metric"])


@pytest.mark.parametrize("dashboard", WATCHED, ids=lambda path: path.stem)
def test_every_panel_has_data(watched: Watched, dashboard: Path) -> None:
    for title, expression in expressions(dashboard):
        watched.server.check_panel(title, expression)


def test_every_recording_rule_has_data(watched: Watched) -> None:
    names = [rule["record"] for rule in rules() if "record" in rule]
    assert names
    for name in names:
        wait_until(lambda name=name: watched.server.query(name), what=name)


@pytest.mark.slow
def test_a_killed_rank_alarms_within_seconds_and_one_that_ends_in_order_does_not(
    watched: Watched,
) -> None:
    server = watched.server
    assert server.firing("VlalRankDown") == []
    watched.rank_1.kill()
    watched.rank_1.wait()
    seconds = wait_until(lambda: server.firing("VlalRankDown"), what="the alarm")
    (labels,) = server.firing("VlalRankDown")
    assert labels["rank"] == "1" and labels["severity"] == "critical"
    assert seconds < 20, seconds

    watched.target_0.remove()

    def forgotten() -> bool:
        active = server.get("targets", state="active")["activeTargets"]
        return all(one["labels"].get("rank") != "0" for one in active)

    wait_until(forgotten, what="the target of rank 0 is gone")
    watched.rank_0.metrics.close()
    wait_until(lambda: not server.query("up{rank='0'}"), what="its series have ended")
    assert [one["rank"] for one in server.firing("VlalRankDown")] == ["1"]
