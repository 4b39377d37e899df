"""T5, T6: a disk or store that fails while a run saves, and checkpoints that were damaged."""

import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.reliability.harness import Job, record, sha256
from tests.reliability.test_signals import SLOW
from vlal_dist.storage.store import open_store

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB; a checkpoint takes about 0.7 of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here (it is for root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def disk(kind: str, at: str, step: int, folder: Path) -> dict[str, Any]:
    return {"kind": kind, "rank": 0, "at": at, "step": step, "path": str(folder)}


def weights(job: Job) -> dict[str, str]:
    return {name: value for name, value in job.bits().items() if name != "metrics"}


def failures(port: int) -> dict[str, float]:
    """`vlal_checkpoint_failures_total` by reason, as a scrape of rank 0 sees it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    found = [line for line in lines if line.startswith("vlal_checkpoint_failures_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in found}


@pytest.mark.timeout(400)
def test_a_full_disk_does_not_stop_training(
    config: Path, tmp_path: Path, undisturbed: Job, small_disk: Path
) -> None:
    job = Job(config, tmp_path, run=str(small_disk / "run"))
    port = int(job.words[job.words.index("--observability.metrics_port") + 1])
    full = [disk("fill", "applied", 3, small_disk), disk("free", "applied", 9, small_disk)]
    start = job.start(SLOW, *full)
    seen: dict[str, float] = {}
    while start.process.poll() is None:
        with suppress(OSError):
            seen = failures(port)
        time.sleep(0.1)
    assert start.wait() == 0, start.text()
    assert seen["disk_full"] == 5 and seen["io"] == seen["other"] == 0, seen
    assert start.text().count("the checkpoint was not written") >= 2
    assert "the best model was not written" in start.text()
    assert weights(job) == weights(undisturbed)
    record("disk full", failures=seen["disk_full"], stopped=False)
    assert not list(small_disk.rglob(".vlal-tmp-*"))


@pytest.mark.timeout(400)
def test_killed_on_a_full_disk_it_resumes_from_the_last_checkpoint(
    config: Path, tmp_path: Path, undisturbed: Job, small_disk: Path
) -> None:
    job = Job(config, tmp_path, run=str(small_disk / "run"))
    kill = {"kind": "kill", "rank": 1, "at": "step", "step": 7}
    start = job.start(disk("fill", "applied", 3, small_disk), kill)
    assert start.wait() not in (0, 75), start.text()
    start.wait_for_all(timeout_s=60)
    assert job.state()["step"] == 2
    (small_disk / "filler").unlink()
    again = job.start()
    assert again.wait() == 0, again.text()
    assert weights(job) == weights(undisturbed) and job.lost_steps() == [5]


@pytest.mark.nightly
def test_a_disk_that_stays_full_ends_the_run_with_exit_code_74(
    config: Path, tmp_path: Path, small_disk: Path
) -> None:
    job = Job(config, tmp_path, run=str(small_disk / "run"))
    start = job.start(disk("fill", "applied", 9, small_disk))
    assert start.wait() == 74, start.text()
    assert "training is complete, but the last checkpoint was not written" in start.text()


class S3Run:
    """A run root in a bucket behind a proxy that breaks on purpose."""

    def __init__(self, server: S3Server, config: Path, folder: Path, proxy: FaultProxy) -> None:
        self.url = server.url()
        self.job = Job(config, folder, run=self.url)
        self.env = {**server.env, "AWS_ENDPOINT_URL": proxy.endpoint}

    def weights(self) -> dict[str, str]:
        store = open_store(self.url)
        newest = max(key for key in store.list_keys("checkpoints/") if key.endswith("COMPLETE"))
        folder = newest.rpartition("/")[0]
        found = {name: f"{folder}/{name}.safetensors" for name in ("model", "optimizer")}
        found["best"] = "best/model.safetensors"
        return {name: sha256(store.read(key)) for name, key in found.items()}


@pytest.mark.timeout(400)
def test_an_unreachable_store_does_not_stop_training(
    moto_s3: S3Server, config: Path, tmp_path: Path, undisturbed: Job
) -> None:
    with FaultProxy(moto_s3.endpoint) as proxy:
        run = S3Run(moto_s3, config, tmp_path, proxy)
        start = run.job.start(SLOW, env={**run.env, "OUTAGE_S": "2"})
        run.job.wait_for(start, lambda events: any(e["event"] == "saved" for e in events))
        proxy.faults.append(Fault("away", match="checkpoints/.*safetensors", seconds=12.0))
        assert start.wait() == 0, start.text()
        assert "the checkpoint was not written" in start.text()
        failed = [one for one in proxy.log if one.fault == "away"]
        assert failed
        assert run.weights() == weights(undisturbed)
        record("store away", stopped=False, requests_unanswered=len(failed))


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_an_outage_longer_than_the_retries(
    ceph_s3: S3Server, config: Path, tmp_path: Path, undisturbed: Job
) -> None:
    """The real patience of a minute, against a real store."""
    with FaultProxy(ceph_s3.endpoint) as proxy:
        run = S3Run(ceph_s3, config, tmp_path, proxy)
        more = ["--training.peer_timeout_s", "300"]
        run.job.words += more
        start = run.job.start(SLOW, env=run.env)
        run.job.wait_for(start, lambda events: any(e["event"] == "saved" for e in events))
        proxy.faults.append(Fault("away", match="checkpoints/.*safetensors", seconds=100.0))
        assert start.wait(timeout_s=600) == 0, start.text()
        assert "the checkpoint was not written" in start.text()
        assert run.weights() == weights(undisturbed)
        steps = [e["t"] for e in run.job.events("step") if e["rank"] == 0]
        stall = max(b - a for a, b in itertools.pairwise(steps))
        record("store away for 100 s", longest_stall_s=stall)


def damage(job: Job, kind: str) -> None:
    folder = sorted(job.run.glob("checkpoints/*/COMPLETE"))[-1].parent
    if kind == "truncated":
        path = folder / "optimizer.safetensors"
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "missing":
        (folder / "model.safetensors").unlink()
    elif kind == "empty mark":
        (folder / "COMPLETE").write_bytes(b"")
    elif kind == "no mark":
        (folder / "COMPLETE").unlink()
    else:
        state = json.loads((folder / "state.json").read_text())
        text = json.dumps({**state, "format": 99})
        mark = json.loads((folder / "COMPLETE").read_text())
        (folder / "state.json").write_text(text)
        (folder / "COMPLETE").write_text(json.dumps({**mark, "state.json": sha256(text.encode())}))


KINDS = ("truncated", "missing", "empty mark", "no mark", "wrong version")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS[1:])]
)
def test_a_damaged_checkpoint_is_skipped(
    config: Path, tmp_path: Path, undisturbed: Job, kind: str
) -> None:
    job = Job(config, tmp_path)
    start = job.start({"kind": "kill", "rank": 1, "at": "step", "step": 7})
    start.wait()
    start.wait_for_all()
    assert job.state()["step"] == 6
    damage(job, kind)
    again = job.start()
    assert again.wait() == 0, again.text()
    assert ("falling back" in again.text()) == (kind != "no mark")
    assert job.bits() == undisturbed.bits() and job.lost_steps() == [3]
    record("damaged checkpoint", kind=kind, resumed_from=4)


@pytest.mark.nightly
def test_only_damaged_checkpoints_are_refused(
    config: Path, tmp_path: Path, undisturbed: Job
) -> None:
    shutil.copytree(undisturbed.run, tmp_path / "run")
    job = Job(config, tmp_path)
    for folder in job.run.glob("checkpoints/*"):
        (folder / "COMPLETE").write_bytes(b"{}")
    start = job.start()
    assert start.wait() == 65, start.text()
    assert "no complete checkpoint" in start.text() and "--resume none" in start.text()
