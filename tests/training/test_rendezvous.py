"""The launcher's variables, and the wait for the other ranks, on real sockets."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from torch._C._distributed_c10d import TCPStore

from tests.fixtures.rank_processes import ROOT, environment, free_port
from tests.fixtures.tracker_servers import black_hole
from vlal_dist.errors import ConfigError, Stopped, StorageError
from vlal_dist.training import rendezvous
from vlal_dist.training.rendezvous import Place, meet, read_place

NAMES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR"),
    *("MASTER_PORT", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)
WAIT: dict[str, Any] = {"timeout_s": 60, "stopped": lambda: False}
TWO = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # recorded, so that what read_place sets is undone
        monkeypatch.delenv(name)


def put(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def place(rank: int, world_size: int = 2) -> Place:
    return Place(rank, rank, world_size, world_size, one_machine=True)


def test_empty_variables_count_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, dict.fromkeys(NAMES, ""))
    assert read_place() == Place(0, 0, 1, 1, one_machine=False)
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("1", "0")  # for DeepSpeed


def test_the_size_of_this_machine_is_known_from_its_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(monkeypatch, TWO | {"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": " 2 ", "LOCAL_RANK": "1"})
    assert read_place() == Place(1, 1, 2, 2, one_machine=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', but must be a number from 0"),
        (TWO | {"WORLD_SIZE": "-2"}, "unset WORLD_SIZE, or start with"),
        (TWO | {"RANK": "1.0"}, "RANK is '1.0'"),
        (TWO | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        (TWO | {"LOCAL_WORLD_SIZE": "4(x2)"}, r"LOCAL_WORLD_SIZE is '4\(x2\)'"),
        (TWO | {"LOCAL_SIZE": "²"}, "LOCAL_SIZE is '²'"),
        (TWO | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, no port from 1 to 65535"),
        (TWO | {"MASTER_PORT": "", "MASTER_ADDR": ""}, "MASTER_ADDR and MASTER_PORT are not set"),
        (TWO | {"RANK": ""}, "WORLD_SIZE is 2 but RANK is not set"),
        (TWO | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "3"}, "RANK is 3 and WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS says 2 tasks"),
        ({"WORLD_SIZE": "", "PMI_SIZE": "4"}, "PMI_SIZE says 4 tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE is 'two'"),
    ],
)
def test_wrong_variables_are_named_with_their_value_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    put(monkeypatch, variables)
    with pytest.raises(ConfigError, match=message) as refused:
        read_place()
    assert "vlal train --ranks N" in str(refused.value) or "_port N" in str(refused.value)


def test_all_ranks_meet_and_share_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, TWO | {"MASTER_PORT": str(free_port())})
    stores = {}

    def come(rank: int) -> None:
        time.sleep(0.3 * (2 - rank))  # rank 0, which serves, comes last
        stores[rank] = meet(place(rank, 3), timeout_s=60, stopped=lambda: False)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stores[0].set("word", "yes")
    assert stores[2].get("word") == b"yes" and sorted(stores) == [0, 1, 2]


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid", "a..b"])
def test_a_master_that_does_not_answer_is_named_soon_and_in_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    port = free_port()
    put(monkeypatch, TWO | {"MASTER_ADDR": address, "MASTER_PORT": str(port)})
    monkeypatch.setattr(rendezvous, "FIRST_WORD_S", 0.2)
    with pytest.raises(StorageError, match="check that rank 0 runs") as refused:
        meet(place(1), timeout_s=1, stopped=lambda: False)
    assert f"rank 0 does not answer at {address}:{port} (MASTER_ADDR" in str(refused.value)
    assert f"{address}:{port}" in caplog.text and "waiting for up to" in caplog.text
    assert caplog.text.count("waiting for") == 1


def test_the_first_word_comes_within_a_minute() -> None:
    assert rendezvous.FIRST_WORD_S + rendezvous.CONNECT_S < 60 and rendezvous.EVERY_S <= 60


def test_another_service_at_the_port_is_not_taken_for_rank_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with black_hole() as server:
        put(monkeypatch, TWO | {"MASTER_PORT": str(urlsplit(server.address).port)})
        with pytest.raises(StorageError, match=r"is not rank 0.*--master_port N"):
            meet(place(1), timeout_s=1, stopped=lambda: False)
        with pytest.raises(StorageError, match=r"cannot listen at.*--master_port N"):
            meet(place(0), timeout_s=1, stopped=lambda: False)


def test_missing_ranks_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, TWO | {"MASTER_PORT": str(free_port())})
    with pytest.raises(StorageError, match=r"11 of 12 ranks have not come.*: 1, 2, .*8, \.\.\., "):
        meet(place(0, 12), timeout_s=0.5, stopped=lambda: False)


def test_ranks_of_an_earlier_attempt_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # torchrun's agent holds the store, and starts the ranks again on it.
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    put(monkeypatch, TWO | {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    come = threading.Thread(target=meet, args=(place(1),), kwargs=WAIT)
    come.start()
    meet(place(0), **WAIT).set("word", "of the first attempt")
    come.join()
    put(monkeypatch, {"TORCHELASTIC_RESTART_COUNT": "1"})
    with pytest.raises(StorageError, match=r"1 of 2 ranks have not come.*: 1, for"):
        meet(place(0), timeout_s=0.5, stopped=lambda: False)
    come = threading.Thread(target=meet, args=(place(1),), kwargs=WAIT)
    come.start()
    assert not meet(place(0), **WAIT).check(["word"])
    come.join()


def test_a_request_to_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, TWO | {"MASTER_PORT": str(free_port())})
    began = time.monotonic()
    for rank in (0, 1):
        with pytest.raises(Stopped, match="waiting for other ranks"):
            meet(place(rank), timeout_s=600, stopped=lambda: time.monotonic() > began + 0.2)
    assert time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.deepspeed
def test_sigterm_is_obeyed_while_rank_0_is_missing(small: Path, tmp_path: Path) -> None:
    port = str(free_port())
    command = [sys.executable, "-m", "vlal_dist.train", "--config", str(small / "config.yaml")]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--paths.run", str(tmp_path / "run")],
            env=environment() | TWO | {"MASTER_PORT": port},
            stderr=output,
            cwd=ROOT,
        )
    try:
        deadline = time.monotonic() + 120
        while f"does not answer at 127.0.0.1:{port}" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, log.read_text()
        assert time.monotonic() - began < 20
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
