"""One writer at a time on S3: leases that are renewed, taken over, and lost, in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.storage.conftest import name_of
from vlal_dist.errors import ConfigError, StorageError
from vlal_dist.storage import lock, s3_client, s3_lease
from vlal_dist.storage.lock import writer_lock
from vlal_dist.storage.s3 import S3Store

REPOSITORY = Path(__file__).parents[2]
KEY = ".vlal-tmp-lock"
SHORT = {"RENEW_S": 0.2, "HOLD_S": 1.0, "EXPIRED_S": 1.5, "POLL_S": 0.1}
HOLD = f"""
import sys
from vlal_dist.errors import StorageError
from vlal_dist.storage import lock, s3_lease
from vlal_dist.storage.lock import writer_lock
from vlal_dist.storage.s3 import S3Store
for name, value in {SHORT}.items():
    setattr(s3_lease, name, value)
lock.GRACE_S = 0.5
if sys.argv[2] == "elsewhere":
    lock._boot = lambda: "another machine"
with writer_lock(sys.argv[1], program="pack"):
    print("holds", flush=True)
    sys.stdin.readline()
    try:
        S3Store(sys.argv[1]).replace("late", b"x")
    except StorageError as error:
        print(error, flush=True)
    else:
        print("wrote", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "GRACE_S", 0.5)
    for name, value in SHORT.items():
        monkeypatch.setattr(s3_lease, name, value)


@pytest.fixture(params=["moto", pytest.param("ceph", marks=[pytest.mark.ceph, pytest.mark.slow])])
def server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    found: S3Server = request.getfixturevalue(f"{request.param}_s3")
    with found.environment():
        yield found


@contextmanager
def holding(root: str, where: str = "elsewhere") -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lease, as if on another machine; a line makes it write."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, root, where],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "holds\n"
        try:
            yield process
        finally:
            process.kill()


def say(process: "subprocess.Popen[str]") -> str:
    """Make the holder write, and return what it says about it."""
    assert process.stdout is not None and process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def lease_of(server: S3Server, root: str) -> dict[str, Any]:
    found = server.client().get_object(**name_of(S3Store(root), KEY))
    return dict(json.loads(found["Body"].read()))


def test_the_second_is_refused_and_the_first_writes_on(server: S3Server) -> None:
    root = server.url()
    with holding(root) as process:
        began = time.monotonic()
        with pytest.raises(StorageError) as error, writer_lock(root, program="merge"):
            pass
        assert time.monotonic() - began < 10 and error.value.exit_code == 74
        for word in (root, f"pack (process {process.pid} on ", "since 20", "Nothing was written"):
            assert word in str(error.value)
        with writer_lock(root, "evaluation/test-model", program="evaluate"):
            assert S3Store(root).list_keys() == []  # leases are hidden
        assert say(process) == "wrote\n"


def test_it_is_renewed_and_removed(server: S3Server) -> None:
    root = server.url()
    with writer_lock(root, program="train"):
        first = lease_of(server, root)
        time.sleep(1.0)
        later = lease_of(server, root)
        assert first["pid"] == os.getpid() and first["id"] == later["id"]
        assert later["renewals"] > first["renewals"]
        assert S3Store(root).create("k", b"x")
    left = server.client().list_objects_v2(Bucket=server.bucket, Prefix=root.split("/", 3)[3])
    assert [entry["Key"].rpartition("/")[2] for entry in left["Contents"]] == ["k"]


def test_a_killed_holder_is_replaced_after_the_named_time(server: S3Server) -> None:
    root = server.url()
    with holding(root) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        with writer_lock(root, program="pack"):
            assert time.monotonic() - began >= s3_lease.EXPIRED_S
            assert lease_of(server, root)["pid"] == os.getpid()


def test_one_of_this_machine_is_replaced_at_once(server: S3Server) -> None:
    root = server.url()
    with holding(root, "here") as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        with writer_lock(root, program="pack"):
            assert time.monotonic() - began < s3_lease.EXPIRED_S


@pytest.mark.slow
def test_a_stopped_holder_that_was_replaced_writes_no_more(server: S3Server) -> None:
    root = server.url()
    with holding(root) as process:
        process.send_signal(signal.SIGSTOP)
        with writer_lock(root, program="merge"):
            S3Store(root).replace("mine", b"x")
            process.send_signal(signal.SIGCONT)
            shown = say(process)
            assert f"merge (process {os.getpid()} on " in shown and "writes no more" in shown
            assert S3Store(root).list_keys() == ["mine"]
            assert process.communicate("\n")[0] == "" and process.returncode == 0
            assert lease_of(server, root)["pid"] == os.getpid()  # it did not remove ours


@pytest.mark.slow
def test_a_stopped_holder_that_was_not_replaced_goes_on(server: S3Server) -> None:
    with holding(server.url()) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(s3_lease.EXPIRED_S + 0.5)
        process.send_signal(signal.SIGCONT)
        assert say(process) == "wrote\n"


@pytest.mark.slow
def test_the_named_time(ceph_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real times: 30 s after the last renewal of a killed holder of another machine."""
    root = ceph_s3.url()
    monkeypatch.undo()
    with ceph_s3.environment(), holding(root) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        with writer_lock(root, program="pack"):
            assert 30 <= time.monotonic() - began < 40


@pytest.mark.slow
def test_of_many_newcomers_one_takes_it_over(server: S3Server) -> None:
    root = server.url()
    with holding(root) as process:
        process.kill()
        process.wait()
        command = [sys.executable, "-c", HOLD, root, "elsewhere"]
        many = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        try:
            deadline = time.monotonic() + 60
            while sum(one.poll() is not None for one in many) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            (winner,) = (one for one in many if one.poll() is None)
            assert winner.communicate("\n\n", timeout=30)[0] == "holds\nwrote\n"
            for one in many:
                if one is not winner:
                    assert "one writer at a time" in one.communicate()[1]
        finally:
            for one in many:
                one.kill()
                one.communicate()


def test_an_outage_is_outlasted(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a lease lasts, with no one there to take it: writes go on afterwards."""
    monkeypatch.setattr(s3_client, "OUTAGE_S", 30.0)
    with FaultProxy(moto_s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = S3Store(moto_s3.url())
        with writer_lock(store.url, program="train"):
            store.create("a", b"x")
            proxy.faults = [Fault("away", match="", seconds=s3_lease.EXPIRED_S + 1)]
            time.sleep(s3_lease.HOLD_S + 0.5)
            assert store.create("b", b"x")
        assert store.list_keys() == ["a", "b"]


def test_an_answer_that_was_lost_is_no_other_writer(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(moto_s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = S3Store(moto_s3.url())
        store.exists("k")  # the endpoint is known
        proxy.faults = [Fault("lost", match="^PUT ")]
        with writer_lock(store.url, program="train"):
            proxy.faults = [Fault("lost", match="^PUT ")]
            time.sleep(1.0)
            assert store.create("a", b"x")


@pytest.mark.parametrize("passed", range(5))
def test_a_lost_answer_is_no_proof_against_a_store(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch, passed: int
) -> None:
    """Whichever request of the probe it is that was done and not answered."""
    with FaultProxy(moto_s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = S3Store(moto_s3.url())
        store.exists("k")  # the endpoint is known
        pass_on = Fault("latency", match="^PUT ", times=passed)
        proxy.faults = [*[pass_on] * bool(passed), Fault("lost", match="^PUT ")]
        with writer_lock(store.url, program="train"):
            assert store.create("a", b"x")


@pytest.mark.parametrize("dropped", ["if-none-match", "if-match"])
def test_a_store_that_ignores_conditions_is_refused_before_it_is_written(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch, dropped: str
) -> None:
    root = moto_s3.url()
    with FaultProxy(moto_s3.endpoint, dropped=[dropped]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(ConfigError) as error, writer_lock(root, program="pack"):
            pass
        assert error.value.exit_code == 64
        assert proxy.endpoint in str(error.value) and dropped in str(error.value).lower()
    left = moto_s3.client().list_objects_v2(Bucket=moto_s3.bucket, Prefix=root.split("/", 3)[3])
    assert "Contents" not in left
