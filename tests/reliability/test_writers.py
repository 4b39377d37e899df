"""Two trainers, packers or scorers on one root: the second is refused, the first is undisturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.fixtures.rank_processes import ROOT, environment, free_port
from tests.scoring.conftest import make_tiny_model
from tests.scoring.test_score_clip import flags
from vlal_dist.storage.lock import writer_lock
from vlal_dist.storage.store import Store, open_store

pytestmark = pytest.mark.slow

Command = Callable[[str], list[str]]
LOCK = ".vlal-tmp-lock"
OWN = (".result.json", ".config.yaml", "config.yaml", "metrics.jsonl", "starts.jsonl", "COMPLETE")
"""Files that hold times, or the root's own name; COMPLETE: digests of one that holds times."""


@pytest.fixture(params=["pack", "score", "train"])
def command(
    request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory
) -> Command:
    """The command line of a program for the root that it writes."""
    config = ["--config", str(small / "config.yaml")]
    if request.param == "pack":
        return lambda root: ["-m", "shard_tools", "pack", *config, "--paths.dataset", root]
    if request.param == "train":
        more = ("--training.epochs", "4", "--training.checkpoint_steps", "4")
        more += ("--observability.metrics", "false")
        return lambda root: ["vlal_dist/train.py", *config, *more, "--paths.run", root]
    model = make_tiny_model(tmp_path_factory.mktemp("clip"), seed=7)
    return lambda root: ["-m", "vlal_dist.score_clip", *config, *flags(model, root)]


@contextmanager
def started(
    command: list[str], log: Path, env: Mapping[str, str | None] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    given = {**environment(), **(env or {})}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={name: value for name, value in given.items() if value is not None},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def finish(command: list[str], log: Path, code: int = 0) -> str:
    with started(command, log) as process:
        assert process.wait(240) == code, log.read_text()
    return log.read_text()


def content(store: Store) -> dict[str, bytes]:
    keys = [key for key in store.list_keys() if not key.endswith(OWN) and "tensorboard/" not in key]
    assert keys
    return {key: store.read(key) for key in keys}


def wait_for(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def refused(command: list[str], log: Path, first: "subprocess.Popen[bytes]") -> None:
    shown = finish(command, log, code=74)
    assert f"(process {first.pid} on " in shown and "has been writing here since 20" in shown
    assert first.poll() is None


def test_on_a_local_root(command: Command, tmp_path: Path) -> None:
    calm, root, log = tmp_path / "calm", tmp_path / "root", tmp_path / "log"
    finish(command(str(calm)), log)
    with started(command(str(root)), log) as first:
        wait_for((root / LOCK).exists, first, log)
        first.send_signal(signal.SIGSTOP)  # else it might be done before the second is there
        refused(command(str(root)), tmp_path / "second", first)
        first.send_signal(signal.SIGCONT)
        assert first.wait(240) == 0, log.read_text()
    assert content(open_store(str(root))) == content(open_store(str(calm)))
    assert not list(root.rglob(".vlal-tmp-*"))


def test_a_killed_one_is_replaced_at_once(command: Command, tmp_path: Path) -> None:
    calm, root, log = tmp_path / "calm", tmp_path / "root", tmp_path / "log"
    finish(command(str(calm)), log)
    with started(command(str(root)), log) as first:
        wait_for((root / LOCK).exists, first, log)
        first.kill()
    assert (root / LOCK).exists()
    assert "waiting for" not in finish(command(str(root)), log)
    assert content(open_store(str(root))) == content(open_store(str(calm)))


def test_on_s3(command: Command, ceph_s3: S3Server, tmp_path: Path) -> None:
    calm, root, log = ceph_s3.url(), ceph_s3.url(), tmp_path / "log"
    finish(command(calm), log)
    store = open_store(root)
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    with FaultProxy(ceph_s3.endpoint) as proxy:
        # So long that it is still at work when the second has looked at its lease.
        proxy.faults = [Fault("latency", match=r"^PUT (?!.*\.vlal-tmp)", times=999, seconds=4.0)]
        through = {"AWS_ENDPOINT_URL": proxy.endpoint}
        with started(command(root), log, {**os.environ, **through}) as first:

            def held() -> bool:
                listed = ceph_s3.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/{LOCK}")
                return "Contents" in listed

            wait_for(held, first, log)
            refused(command(root), tmp_path / "second", first)
            proxy.faults = []
            assert first.wait(240) == 0, log.read_text()
    assert content(store) == content(open_store(calm))


def test_the_other_ranks_of_a_refused_one_end(small: Path, tmp_path: Path) -> None:
    words = ["--config", str(small / "config.yaml"), "--paths.run", str(tmp_path / "run")]
    with writer_lock(str(tmp_path / "run"), program="pack"):
        shown = finish(["-m", "vlal_dist", "train", "--ranks", "2", *words], tmp_path / "log", 74)
    assert f"pack (process {os.getpid()} on " in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.deepspeed
def test_two_launches_by_mistake(small: Path, tmp_path: Path) -> None:
    """As `srun deepspeed ...` with two tasks does: each is rank 0 of 1."""
    program = str(Path(sys.executable).parent / "deepspeed")
    run, logs = tmp_path / "run", [tmp_path / "one", tmp_path / "two"]
    words = ["vlal_dist/train.py", "--config", str(small / "config.yaml"), "--paths.run", str(run)]
    words += ["--training.epochs", "40", "--training.log_steps", "1"]
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                started([program, "--num_accelerators", "1", "--master_port", port, *words], log)
            )
            for log, port in zip(logs, (str(free_port()), str(free_port())), strict=True)
        ]
        codes = [process.wait(280) for process in both]
    assert sorted(codes) == [0, 74], [log.read_text() for log in logs]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == sorted(set(steps)) and len(steps) == 160
