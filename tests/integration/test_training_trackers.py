"""Trackers of real runs: they receive every record, and none of them delays the run."""

import contextlib
import json
import logging
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.rank_exporter import BUILD
from tests.fixtures.tiny_vaw import run as run_stage
from tests.fixtures.tracker_servers import MARK, black_hole, left_behind
from tests.integration.test_training_runs import arguments, end, finish, lines, start
from tests.observability.test_trackers import API_KEY, histories, scalars
from vlal_dist.errors import ConfigError
from vlal_dist.observability.metric_definitions import TRACKERS
from vlal_dist.observability.metrics import TrainMetrics
from vlal_dist.observability.trackers import NOT_TRACKED, numbers
from vlal_dist.storage.store import open_store
from vlal_dist.training.run_log import check_trackers, identity_of, open_trackers

pytestmark = pytest.mark.deepspeed


def curves(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """Every number of `metrics.jsonl`, as TensorBoard should have it."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for line in lines(run):
        kept = {name: value for name, value in line.items() if name not in NOT_TRACKED}
        for name, value in numbers(kept).items():
            close = pytest.approx(value, rel=1e-6)  # TensorBoard keeps float32
            found.setdefault(f"{line['kind']}/{name}", []).append((line["step"], close))
    return found


def command(small: Path, run: Path, trackers: str, *more: str) -> list[str]:
    words = arguments(small, run, "--observability.trackers", trackers, *more)
    return [sys.executable, *words]


def noted(run: Path) -> int:
    """The last step that W&B has received, 0 for none."""
    for path in run.glob("wandb/*.steps.json"):
        with contextlib.suppress(ValueError):  # just being written
            return int(json.loads(path.read_text())["train"])
    return 0


def wait_for_step(run: Path, process: subprocess.Popen[str], *, after: int) -> None:
    """Wait until W&B has received a later step than the given one."""
    deadline = time.monotonic() + 200
    while noted(run) <= after:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_run_continues_its_curves(small: Path, tmp_path: Path) -> None:
    run, env = tmp_path / "run", {"WANDB_MODE": "offline", MARK: str(tmp_path)}
    endless = command(small, run, "[tensorboard, wandb]", "--training.epochs", "1000")
    first = start(endless, env)
    wait_for_step(run, first, after=8)
    end(first)
    assert left_behind(str(tmp_path)) == []
    killed_at = noted(run)
    second = start(endless, env)
    wait_for_step(run, second, after=killed_at + 4)
    second.send_signal(signal.SIGTERM)
    assert "resuming" in finish(second, 75)
    known = curves(run)
    assert {"train/loss", "train/loss_positive", "train/lr/head"} < set(known)
    assert {"train/samples_per_s", "validation/mAP", "validation/groups/overall"} < set(known)
    assert scalars(run / "tensorboard") == known
    steps = [row["_step"] for row in histories(run)]
    assert steps == sorted(set(steps)) and steps[0] == 2 and steps[-1] > killed_at
    identity = json.loads((run / "trackers.json").read_text())["identity"]
    assert len(list(run.glob(f"wandb/offline-run-*-{identity}"))) == 2
    assert left_behind(str(tmp_path)) == []


@pytest.mark.slow
def test_unreachable_trackers_delay_only_the_end_by_seconds(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with black_hole() as hole:
        env = {"WANDB_BASE_URL": hole.address, "WANDB_API_KEY": API_KEY, MARK: str(run)}
        env |= {"MLFLOW_TRACKING_URI": hole.address}
        words = command(small, run, "[tensorboard, wandb, mlflow]")
        output = finish(start(words, env))
        assert left_behind(str(run)) == []
    assert "train: done: epochs 2, steps 8" in output
    for name in ("wandb", "mlflow"):
        assert f"tracker {name}: not closed cleanly" in output
    assert scalars(run / "tensorboard") == curves(run)
    assert API_KEY not in "".join(
        path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()
    )


def test_trackers_without_library_or_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    check_trackers(TRACKERS)
    with pytest.raises(ConfigError, match=r"not installed; run: pip install .*\[trackers\]"):
        check_trackers(["no_such_tracker"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
        check_trackers(["mlflow"])


def test_a_folder_is_not_taken_for_a_tracker_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "offline_runs").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="not installed"):
        check_trackers(["offline_runs"])


def test_a_run_keeps_its_identity_until_it_starts_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    enabled_later = identity_of(store, step=4)
    assert identity_of(store, step=8) == enabled_later and not caplog.records
    restarted = identity_of(store, step=0)
    assert restarted != enabled_later and identity_of(store, step=2) == restarted
    (tmp_path / "trackers.json").write_text("[]")
    assert identity_of(store, step=2) != restarted and "begin a new run" in caplog.text


def test_a_remote_run_root_has_no_event_files(
    moto_s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = open_store(moto_s3.url())
    metrics = TrainMetrics(BUILD, read=dict)
    with ExitStack() as stack:
        one = open_trackers(stack, ["tensorboard"], store=store, step=0, metrics=metrics)
        one.log({"kind": "train", "step": 2, "loss": 0.5})
    assert f"none for {store.url}" in caplog.text and store.list_keys() == []


def test_an_unknown_tracker_is_a_config_error(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--observability.trackers", "[tensorbored]"]
    assert run_stage("vlal_dist.train", small / "config.yaml", *wrong) == 64
    assert "observability.trackers" in capsys.readouterr().err
