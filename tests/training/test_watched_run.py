"""A Prometheus that watches two training ranks finds what the run itself wrote down."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.observability.live import Prometheus, needs_prometheus, quick, running
from tests.training.processes import free_port
from tests.training.test_runs import arguments, end, finish, lines, start

pytestmark = [needs_prometheus, pytest.mark.deepspeed, pytest.mark.long]

EPOCHS = 1000  # until it is stopped: how soon Prometheus hears of a target is not ours to say
ROWS = 16 // 2  # of a rank in each step


def test_queried_values_are_the_runs_own(small: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", str(free_port())
    config = quick(tmp_path)
    more = ("--observability.targets", str(tmp_path / "vlal"))
    more += ("--training.epochs", str(EPOCHS), "--model.width", "8")
    with running(config) as server:
        ranks = []
        for rank in ("0", "1"):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks.append(start([sys.executable, *arguments(small, run, *more)], env))
        try:
            wait_until_seen(server, ranks)
            ranks[1].send_signal(signal.SIGTERM)
            for one in ranks:
                finish(one, 75)
        finally:
            for one in ranks:
                end(one)

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
