"""X1: kills, S3 faults and other numbers of ranks, against a real Ceph gateway.

Two runs of SOAK_MINUTES each (20), one after the other, both on S3 behind a proxy that breaks a
share of all replies. The first is killed and stopped at random and goes on with one to three ranks;
its ledgers must hold. The second meets only the faults of the proxy; its memory and handles
must stay flat.
"""

import os
import random
import statistics
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.reliability.harness import Job, Start, each_once_an_epoch, record

pytestmark = [pytest.mark.deepspeed, pytest.mark.nightly]

MINUTES = float(os.environ.get("SOAK_MINUTES", "20"))
MTBF_S = 25.0
FAULTS = [
    Fault("reset", times=10**9, chance=0.02, at=1000),
    Fault("truncate", times=10**9, chance=0.01, at=500),
    Fault("busy", match=".", times=10**9, chance=0.02),
    # Twice in a row for one sample would be damage, and would rightly end the run.
    Fault("flip", match="shards/.*tar", times=10**9, chance=0.0005, at=300),
    Fault("lost", match="^PUT ", times=10**9, chance=0.02),
    Fault("stall", times=10**9, chance=0.0005, at=10, seconds=25.0),
    Fault("latency", match=".", times=10**9, chance=0.05, seconds=0.2),
]


@pytest.fixture(scope="module")
def remote(ceph_s3: S3Server, config: Path) -> str:
    """The merged dataset in the bucket; its URL."""
    url = ceph_s3.url()
    client = ceph_s3.client()
    merged = config.parent / "merged"
    for path in sorted(one for one in merged.rglob("*") if one.is_file()):
        key = f"{url.removeprefix(f's3://{ceph_s3.bucket}/')}/{path.relative_to(merged)}"
        client.put_object(Bucket=ceph_s3.bucket, Key=key, Body=path.read_bytes())
    return url


def job_on_s3(server: S3Server, config: Path, folder: Path, remote: str, *more: str) -> Job:
    more = ("--paths.merged", remote, "--training.epochs", "100000", *more)
    more += ("--training.peer_timeout_s", "120", "--training.checkpoint_steps", "10")
    return Job(config, folder, run=server.url(), more=more)


@pytest.mark.timeout(3600)
def test_kills_faults_and_other_numbers_of_ranks(
    ceph_s3: S3Server, config: Path, tmp_path: Path, remote: str
) -> None:
    draw = random.Random(11)
    job = job_on_s3(ceph_s3, config, tmp_path, remote)
    ends = {"killed": 0, "one rank killed": 0, "stopped": 0}
    until = time.monotonic() + MINUTES * 60
    with FaultProxy(ceph_s3.endpoint) as proxy:
        env = {**ceph_s3.env, "AWS_ENDPOINT_URL": proxy.endpoint}
        proxy.faults += FAULTS
        while time.monotonic() < until:
            job.world_size = draw.choice([1, 2, 3])
            start = job.start(
                {"kind": "sleep", "at": "step", "seconds": 0.05, "often": True}, env=env
            )
            time.sleep(15 + draw.expovariate(1 / MTBF_S))
            how = draw.choice(list(ends))
            ends[how] += 1
            end(start, how, job, draw)
        # To the end of the epoch that is under way, so that the last one is complete too.
        reached = max(e["step"] for e in job.events("step"))
        job.world_size = 2
        start = job.start(env={**env})
        job.wait_for_step(start, -(-reached // 4) * 4 + 1)
        end(start, "stopped", job, draw)
        faults = sum(one.fault is not None for one in proxy.log)
        requests = len(proxy.log)
    trained = job.trained()
    complete = {step: uids for step, uids in trained.items() if step <= max(trained) // 4 * 4}
    each_once_an_epoch(complete, steps=4)
    assert "the ledger differs" not in start.text()
    record(
        "soak, disturbed", minutes=MINUTES, ends=ends, epochs=len(complete) // 4,
        faults=faults, requests=requests, lost=job.lost_steps(),
    )  # fmt: skip


def end(start: Start, how: str, job: Job, draw: random.Random) -> None:
    if how == "killed":
        start.kill()
        return
    ranks = [
        pid for pid, words in start.processes().items() if any("faulty" in w for w in words[:3])
    ]
    number = 9 if how == "one rank killed" else 15
    if ranks:
        os.kill(draw.choice(ranks), number)
    else:
        start.process.terminate()
    start.wait(timeout_s=200)
    start.wait_for_all(timeout_s=150)


def quarters(values: list[float]) -> list[list[float]]:
    size = len(values) // 4
    return [values[i * size : (i + 1) * size] for i in range(4)]


@pytest.mark.timeout(3600)
def test_memory_and_handles_stay_flat(
    ceph_s3: S3Server, config: Path, tmp_path: Path, remote: str
) -> None:
    job = job_on_s3(ceph_s3, config, tmp_path, remote, "--training.checkpoint_epochs", "10")
    with FaultProxy(ceph_s3.endpoint) as proxy:
        env = {**ceph_s3.env, "AWS_ENDPOINT_URL": proxy.endpoint}
        proxy.faults += FAULTS
        start = job.start(env=env)
        job.wait_for_step(start, 1)
        ranks = {e["rank"]: e["pid"] for e in job.events("begin")}
        seen: list[tuple[float, int, float, int]] = []
        began = time.monotonic()
        while (now := time.monotonic() - began) < MINUTES * 60:
            assert start.process.poll() is None, start.text()[-5000:]
            for rank, pid in ranks.items():
                assert psutil.pid_exists(pid), start.text()[-5000:]
                seen.append((now, rank, resident_mib(pid), len(os.listdir(f"/proc/{pid}/fd"))))
            time.sleep(2)
        end(start, "stopped", job, random.Random(0))
        assert start.process.returncode == 75, start.text()[-5000:]
    figures = {}
    for rank in ranks:
        # The first fifth is warming up: allocators, connections, the window of the stream.
        rows = [row for row in seen if row[1] == rank and row[0] > MINUTES * 60 / 5]
        minutes = [row[0] / 60 for row in rows]
        memory, handles = [row[2] for row in rows], [row[3] for row in rows]
        slope = statistics.linear_regression(minutes, memory).slope
        figures[rank] = {
            "mib_per_minute": round(slope, 3),
            "mib": [round(min(memory), 1), round(max(memory), 1)],
            "mib_of_quarters": [round(statistics.median(q), 1) for q in quarters(memory)],
            "handles": [min(handles), max(handles)],
            "handles_per_minute": statistics.linear_regression(minutes, handles).slope,
        }
    steps = max(e["step"] for e in job.events("step"))
    record("soak, watched", minutes=MINUTES, steps=steps, ranks=figures)
    for one in figures.values():
        assert abs(one["mib_per_minute"]) < 2.0, figures
        assert abs(one["handles_per_minute"]) < 0.5, figures


def resident_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/statm").read_text()
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
