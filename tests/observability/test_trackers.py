import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)

from tests.fixtures.rank_processes import ROOT, environment, free_port
from tests.fixtures.tracker_servers import MARK, black_hole, left_behind, mlflow_server
from vlal_dist.observability import tracker_process, trackers
from vlal_dist.observability.event_files import EventFiles
from vlal_dist.observability.tracker_process import ProcessTracker
from vlal_dist.observability.trackers import Record, Tracker, Trackers, numbers

API_KEY = "0" * 40


def train_record(step: int, loss: float) -> dict[str, Any]:
    ledger = {"count": step, "sum": 2**63}
    return {"kind": "train", "step": step, "epoch": 0, "loss": loss, "ledger": ledger}


def validation_record(step: int, mean_ap: float) -> dict[str, Any]:
    groups = {"overall": mean_ap, "wood & co": 0.5}
    return {"kind": "validation", "step": step, "epoch": 0, "groups": groups, "best": True}


def record(step: int, loss: float) -> Record:
    return Record("train", step, 1e9 + step, {"loss": loss})


def test_numbers_are_taken_from_inner_mappings_and_nothing_else_is() -> None:
    found = numbers({"a": 1, "lr": {"head": 0.5, "none": None}, "best": True, "kind": "x"})
    assert found == {"a": 1.0, "lr/head": 0.5}


class Kept:
    """A tracker that keeps what it is given, and does what a test says first."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.done: bool | None = None
        self.free = threading.Event()
        self.free.set()
        self.failures = 0
        self.abandoned = False

    def log(self, record: Record) -> None:
        self.free.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the server is away")
        self.records.append(record)

    def close(self, *, done: bool) -> None:
        self.done = done

    def abandon(self) -> None:
        self.abandoned = True
        self.free.set()


class Drops(dict[str, int]):
    def __call__(self, name: str, count: int) -> None:
        self[name] = self.get(name, 0) + count


def test_records_arrive_in_order_and_without_what_no_curve_can_show() -> None:
    kept, drops = Kept(), Drops()
    all_of_them = Trackers({"one": lambda: kept}, dropped=drops)
    for step in range(5):
        all_of_them.log(train_record(step, 0.5))
    all_of_them.close(done=True)
    assert [(one.kind, one.step, one.values) for one in kept.records] == [
        ("train", step, {"epoch": 0.0, "loss": 0.5}) for step in range(5)
    ]
    assert kept.done is True and not drops and not kept.abandoned


def test_what_fails_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "FIRST_PAUSE_S", 0.01)
    kept, attempts = Kept(), [OSError("no such host")]
    kept.failures = 2

    def start() -> Tracker:
        if attempts:
            raise attempts.pop()
        return kept

    one = Trackers({"one": start}, dropped=Drops())
    for step in range(3):
        one.log(train_record(step, 0.5))
    deadline = time.monotonic() + 10
    while len(kept.records) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    one.close(done=False)
    assert [one.step for one in kept.records] == [0, 1, 2] and kept.done is False
    assert "tracker one: OSError: no such host; retrying in 0 s; training goes on" in caplog.text
    assert caplog.text.count("ConnectionError: the server is away") == 2


def test_one_that_hangs_neither_holds_up_a_log_nor_the_end_nor_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "QUEUE", 10)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.5)
    hanging, healthy, drops = Kept(), Kept(), Drops()
    hanging.free.clear()
    both = Trackers({"slow": lambda: hanging, "well": lambda: healthy}, dropped=drops)
    longest = 0.0
    for step in range(100):
        started = time.monotonic()
        both.log(train_record(step, 0.5))
        longest = max(longest, time.monotonic() - started)
        time.sleep(0.002)  # lets the healthy one's thread keep up
    assert longest < 0.5
    assert drops == {"slow": 90}
    assert caplog.text.count("its queue of 10 records is full; records dropped: 1;") == 1
    started = time.monotonic()
    both.close(done=True)
    assert time.monotonic() - started < 3
    assert [one.step for one in healthy.records] == list(range(100))
    assert hanging.abandoned and len(hanging.records) <= 10


def test_one_that_cannot_be_opened_costs_the_end_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def start() -> Tracker:
        raise PermissionError("not yours")

    drops = Drops()
    one = Trackers({"one": start}, dropped=drops)
    one.log(train_record(1, 0.5))
    time.sleep(0.1)
    started = time.monotonic()
    one.close(done=True)
    assert time.monotonic() - started < 2
    assert drops == {"one": 1} and "records not delivered: 1;" in caplog.text


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard shows them; its two readers must agree on the steps."""
    old, new = EventAccumulator(str(folder)), PluginEventAccumulator(str(folder))
    old.Reload()
    new.Reload()
    tags = old.Tags()["scalars"]
    found = {tag: [(event.step, event.value) for event in old.Scalars(tag)] for tag in tags}
    for tag, events in found.items():
        assert [event.step for event in new.Tensors(tag)] == [step for step, _ in events]
    return found


def later(folder: Path, *, step: int, monkeypatch: pytest.MonkeyPatch) -> EventFiles:
    """A start one second later: files are read in the order of the seconds in their names."""
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 1)
        return EventFiles(folder, step=step)


def test_event_files_are_read_back(tmp_path: Path) -> None:
    files = EventFiles(tmp_path / "events", step=0)
    for step in (2, 4, 6):
        files.log(record(step, 1 / step))
    expected = [(n, pytest.approx(1 / n)) for n in (2, 4, 6)]
    assert scalars(tmp_path / "events") == {"train/loss": expected}


def test_steps_after_the_checkpoint_are_superseded_and_a_new_run_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = EventFiles(tmp_path, step=0)
    for step in (2, 4, 6, 8):
        first.log(record(step, 1.0))
    second = later(tmp_path, step=4, monkeypatch=monkeypatch)
    for step in (6, 8, 10):
        second.log(record(step, 2.0))
    expected = [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0), (10, 2.0)]
    assert scalars(tmp_path)["train/loss"] == expected
    (tmp_path / "notes.txt").write_text("the user's own")
    anew = EventFiles(tmp_path, step=0)
    anew.log(record(2, 3.0))
    assert scalars(tmp_path)["train/loss"] == [(2, 3.0)] and (tmp_path / "notes.txt").exists()


def test_what_a_full_disk_cut_short_hides_nothing_that_follows(tmp_path: Path) -> None:
    files = EventFiles(tmp_path, step=0)
    files.log(record(2, 1.0))
    (path,) = tmp_path.iterdir()
    with path.open("ab") as file:
        file.write(b"\x99" * 11)
    files.log(record(4, 2.0))
    assert scalars(tmp_path)["train/loss"] == [(2, 1.0), (4, 2.0)]


def feed(
    name: str, identity: str, folder: Path, records: list[dict[str, Any]], *, done: bool = True
) -> None:
    """A run with one tracker; the time to close is the client's, not ours."""
    drops = Drops()
    one = Trackers(
        {name: lambda: ProcessTracker(name, identity=identity, folder=folder)}, dropped=drops
    )
    for record in records:
        one.log(record)
    one.close(done=done)
    assert not drops


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time to close for clients that may still be importing on a busy machine."""
    monkeypatch.setattr(trackers, "CLOSE_S", 150.0)
    monkeypatch.setattr("vlal_dist.observability.tracker_process.CLOSE_S", 150.0)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Processes that inherit this must be gone at the end."""
    monkeypatch.setenv(MARK, str(tmp_path))
    yield str(tmp_path)
    assert left_behind(str(tmp_path)) == []


def histories(folder: Path) -> list[dict[str, float]]:
    """What W&B kept offline, start by start, read by W&B's own program."""
    program = str(Path(sys.executable).parent / "wandb")
    found: list[dict[str, float]] = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        shown = subprocess.run(
            [program, "leet", "inspect", "--json", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        lines = [json.loads(line) for line in shown.splitlines()]
        found += [line["history"]["item"] for line in lines if line["type"] == "history"]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("patient", "mark")
def test_wandb_offline_holds_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    begun = [train_record(2, 0.5), train_record(4, 0.25), validation_record(4, 0.75)]
    feed("wandb", "run1", tmp_path, begun, done=False)
    # From the checkpoint of step 2: step 4 comes once more, and then something new.
    feed("wandb", "run1", tmp_path, [*begun[1:], train_record(6, 0.125)])
    found = histories(tmp_path)
    assert [row["_step"] for row in found] == [2, 4, 6]
    assert [row["train/loss"] for row in found] == [0.5, 0.25, 0.125]
    assert found[1]["validation/groups/overall"] == 0.75
    feed("wandb", "run2", tmp_path, begun)
    assert [row["_step"] for row in histories(tmp_path)] == [2, 4, 6, 2, 4]


UNHEARD = """
import sys, time
from pathlib import Path
from tests.observability.test_trackers import record
from vlal_dist.observability.tracker_process import ProcessTracker
tracker = ProcessTracker("wandb", identity="run1", folder=Path(sys.argv[1]))
for step in (2, 4, 6):
    tracker.log(record(step, 0.5))
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("mark")
def test_wandb_has_all_of_a_trainer_that_was_killed_with_whoever_read_it(tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", UNHEARD, str(tmp_path)],
        env={**environment(), "WANDB_MODE": "offline"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert trainer.stdout is not None and trainer.stderr is not None
    assert trainer.stdout.readline() == b"begun\n"
    trainer.stdout.close()
    trainer.stderr.close()
    trainer.kill()
    trainer.wait()
    assert left_behind(str(tmp_path), seconds=150) == []
    assert [row["_step"] for row in histories(tmp_path)] == [2, 4, 6]


def asked(address: str, path: str, **query: str) -> Any:
    url = f"{address}/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


@pytest.mark.slow
@pytest.mark.usefixtures("patient", "mark")
def test_mlflow_holds_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    begun = [train_record(2, 0.5), train_record(4, 0.25), validation_record(4, 0.75)]
    with mlflow_server(tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        feed("mlflow", "run1", tmp_path, begun, done=False)
        experiment = asked(address, "experiments/get-by-name", experiment_name="ours")
        number = experiment["experiment"]["experiment_id"]

        def runs() -> list[Any]:
            body = json.dumps({"experiment_ids": [number]}).encode()
            request = urllib.request.Request(
                f"{address}/api/2.0/mlflow/runs/search",
                data=body,
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                return list(json.load(response)["runs"])

        (run,) = runs()
        assert run["info"]["status"] == "FAILED"
        feed("mlflow", "run1", tmp_path, [*begun[1:], train_record(6, 0.125)])
        (run,) = runs()
        assert run["info"]["status"] == "FINISHED"

        def history(name: str) -> list[tuple[int, float]]:
            known = asked(
                address, "metrics/get-history", run_id=run["info"]["run_id"], metric_key=name
            )
            return [(int(one["step"]), one["value"]) for one in known["metrics"]]

        assert history("train/loss") == [(2, 0.5), (4, 0.25), (6, 0.125)]
        assert history("validation/groups/overall") == [(4, 0.75)]
        assert history("validation/groups/wood _ co") == [(4, 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.usefixtures("mark")
def test_a_black_hole_gets_its_seconds_and_no_more(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with black_hole() as hole:
        monkeypatch.setenv("WANDB_BASE_URL", hole.address)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", hole.address)
        one = Trackers(
            {name: lambda: ProcessTracker(name, identity="run1", folder=tmp_path)},
            dropped=Drops(),
        )
        for step in range(5):
            one.log(train_record(step, 0.5))
        assert hole.came.wait(150)
        started = time.monotonic()
        one.close(done=True)
        assert time.monotonic() - started < trackers.CLOSE_S + 1.5
    assert f"tracker {name}: not closed cleanly" in caplog.text


KILLED = """
import sys, time
from pathlib import Path
from vlal_dist.observability.tracker_process import ProcessTracker
tracker = ProcessTracker("mlflow", identity="run1", folder=Path(sys.argv[1]))
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_process(tmp_path: Path) -> None:
    with black_hole() as hole:
        more = {"MLFLOW_TRACKING_URI": hole.address, MARK: str(tmp_path)}
        trainer = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            env={**environment(), **more},
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"begun\n"
        assert hole.came.wait(150)
        assert len(left_behind(str(tmp_path), seconds=0)) == 2
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        trainer.stdout.close()
        assert left_behind(str(tmp_path), seconds=trackers.CLOSE_S + 2) == []


def test_a_process_that_dies_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tracker = ProcessTracker("mlflow", identity="run1", folder=tmp_path)
    os.kill(tracker._process.pid, signal.SIGKILL)
    tracker._process.wait()
    with pytest.raises(ConnectionError, match="ended with code -9"):
        tracker.log(record(2, 0.5))
    tracker.abandon()


def test_a_server_that_does_not_answer_is_named_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker_process, "ANSWER_S", 0.2)
    assert tracker_process.watched(lambda: 1, name="wandb") == 1
    with black_hole() as hole:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", hole.address.replace("//", "//u:hunter2@"))
        with pytest.raises(OSError):
            tracker_process.watched(
                partial(urllib.request.urlopen, hole.address, timeout=1), name="mlflow"
            )
        host = hole.address.removeprefix("http://")
    assert f"no answer from http://***@{host} (MLFLOW_TRACKING_URI)" in caplog.text
    assert "take it off observability.trackers" in caplog.text and "hunter2" not in caplog.text
    assert "wandb" not in caplog.text


def test_secrets_of_clients_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    said = f"key {'k' * 40} at https://me:hunter2@host/x"
    assert tracker_process.without_secrets(said) == "key *** at https://***@host/x"


@pytest.mark.slow
def test_no_password_of_a_tracker_is_printed(tmp_path: Path) -> None:
    """A trainer whose MLflow is gone: its line names the server, and nothing has the password."""
    uri = f"http://me:hunter2@127.0.0.1:{free_port()}"
    code = f"""
import pathlib, time
from vlal_dist.observability.logs import setup_logging
from vlal_dist.observability.tracker_process import ProcessTracker
from vlal_dist.observability.trackers import Record
setup_logging()
tracker = ProcessTracker("mlflow", identity="a" * 16, folder=pathlib.Path({str(tmp_path)!r}))
tracker.log(Record("train", 1, 1e9, {{"loss": 0.5}}))
time.sleep(40)
tracker.abandon()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_TRACKING_TOKEN": "t0ken"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"no answer from http://***@127.0.0.1:{uri[-5:]}"[:40] in done.stderr, done.stderr
    written = "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    assert "hunter2" not in done.stderr + done.stdout + written
    assert "t0ken" not in done.stderr + done.stdout + written


def test_the_trainer_imports_no_client() -> None:
    code = "import sys, vlal_dist.training.run_log as t\n"
    code += "sys.exit(bool({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 0
