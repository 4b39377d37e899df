"""The rendezvous: which rank this process is, and waiting until all ranks have come.

torch's own rendezvous obeys no signal and logs nothing until its timeout.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from vlal_dist.errors import ConfigError, Stopped, StorageError
from vlal_dist.processes import launcher_number

logger = logging.getLogger(__name__)

LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Variables with the number of processes of this machine: torchrun's, then DeepSpeed's."""
FOREIGN_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables with the number of tasks of other launchers."""
CONNECT_S = 4.0
"""Longest answer of a store that is reached; longest attempt to reach it."""
FIRST_WORD_S, EVERY_S = 15.0, 60.0
"""After what wait a rank logs what it waits for, and how often it does so again."""
PORT_REMEDY = (
    "if another job uses the port, give the launcher another one: deepspeed --master_port N, "
    "torchrun --master_port N"
)

Pause = Callable[[str, str], None]
"""Called with what is waited for, and what may help."""


@dataclass(frozen=True)
class Place:
    """What the launcher's variables say about this process.

    Attributes:
        rank, local_rank, world_size: as of `Ranks`.
        local_size: processes on this machine, as far as it is known; else `world_size`.
        one_machine: whether it is known that all processes are on this machine.
    """

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    one_machine: bool


def read_place() -> Place:
    """The variables of the launcher, checked; without them a single rank.

    Raises:
        ConfigError: a variable is no number or out of range, or some are missing.
    """
    remedy = "start with vlal train --ranks N, deepspeed or torchrun"
    if not os.environ.get("WORLD_SIZE"):
        for name in FOREIGN_SIZES:
            if (tasks := launcher_number(name, 1)) > 1:
                raise ConfigError(
                    f"{name} says {tasks} tasks, but no launcher set WORLD_SIZE: each task would "
                    f"train alone into one run root; {remedy}"
                )
    world_size = launcher_number("WORLD_SIZE", 1)
    rank, local_rank = launcher_number("RANK", 0), launcher_number("LOCAL_RANK", 0)
    local_sizes = [size for size in (launcher_number(name, 0) for name in LOCAL_SIZES) if size]
    local_size = local_sizes[0] if local_sizes else world_size
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ()
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE is {world_size} but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; {remedy}, or unset WORLD_SIZE for "
            "one process"
        )
    if not rank < world_size:
        raise ConfigError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}; ranks count from 0 to WORLD_SIZE - "
            f"1: {remedy}"
        )
    if needed and not 0 < launcher_number("MASTER_PORT", 0) < 1 << 16:
        raise ConfigError(
            f"MASTER_PORT is {os.environ['MASTER_PORT']}, no port from 1 to 65535; give the "
            "launcher another one: deepspeed --master_port N, torchrun --master_port N"
        )
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", world_size)):
        os.environ[name] = str(value)  # for DeepSpeed, which reads them itself
    known = bool(local_sizes) and local_size == world_size
    return Place(rank, local_rank, world_size, local_size, one_machine=known)


def meet(place: Place, *, timeout_s: float, stopped: Callable[[], bool]) -> Store:
    """Connect to the store of rank 0 (or of torchrun), and wait until every rank has done so.

    Args:
        place: of this process, in a job of several.
        timeout_s: longest wait.
        stopped: whether this process was asked to stop.

    Raises:
        StorageError: the port is taken, nothing answers there, or ranks are missing.
        Stopped: `stopped` says so.
    """
    host, port = os.environ["MASTER_ADDR"], launcher_number("MASTER_PORT", 0)
    where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    pause = _Wait(timeout_s=timeout_s, stopped=stopped).pause
    # torchrun's agent holds the store itself.
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        while reason := _no_answer(host, port):
            pause(
                f"rank 0 does not answer at {where}: {reason}",
                "check that rank 0 runs, that MASTER_ADDR is its machine and that no firewall "
                f"closes the port; {PORT_REMEDY}",
            )
    store = _open_store(host, port, place, serves=serves, where=where, pause=pause)
    # torchrun's store outlives a restart of its ranks, and keeps what they wrote.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
    store = PrefixStore(f"attempt {attempt}", store)
    names = [f"here/{rank}" for rank in range(place.world_size)]
    try:
        store.set(names[place.rank], "")
        while not store.check(names):
            missing = [str(n) for n, name in enumerate(names) if not store.check([name])]
            listed = ", ".join(missing[:8]) + ("" if len(missing) <= 8 else ", ...")
            pause(
                f"{len(missing)} of {place.world_size} ranks have not come to {where}: {listed}",
                "see the logs of those ranks and of the launcher on their machines",
            )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise StorageError(f"rank 0 at {where} is gone ({reason}); see its own log") from None
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _no_answer(host: str, port: int) -> str:
    """Why no connection is accepted there; empty if one is."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S):
            return ""
    except (OSError, ValueError) as error:  # ValueError: no name of a host
        return str(error)


def _open_store(
    host: str, port: int, place: Place, *, serves: bool, where: str, pause: Pause
) -> Store:
    """The store, opened in a thread: opening hangs where something else answers at the port."""
    opened: list[Store | Exception] = []

    def open_it() -> None:
        try:
            opened.append(
                TCPStore(
                    host,
                    port,
                    place.world_size,
                    is_master=serves,
                    timeout=timedelta(seconds=CONNECT_S),
                    wait_for_workers=False,
                )
            )
        except Exception as error:
            opened.append(error)

    threading.Thread(target=open_it, name="rendezvous", daemon=True).start()
    while not opened:
        pause(f"what answers at {where} is not rank 0", PORT_REMEDY)
    if isinstance(opened[0], Store):
        return opened[0]
    reason = str(opened[0]).splitlines()[0]
    verb = "listen" if serves else "connect"
    raise StorageError(f"ranks cannot {verb} at {where}: {reason}; {PORT_REMEDY}")


class _Wait:
    """A wait in the rendezvous, logged from time to time, that ends in time."""

    def __init__(self, *, timeout_s: float, stopped: Callable[[], bool]) -> None:
        self._stopped, self._timeout_s = stopped, timeout_s
        self._began, self._next_word = time.monotonic(), FIRST_WORD_S

    def pause(self, what: str, remedy: str) -> None:
        """Pause for a moment, unless the wait is over."""
        if self._stopped():
            raise Stopped(f"stopped while waiting for other ranks ({what}); nothing was trained")
        waited = time.monotonic() - self._began
        if waited >= self._timeout_s:
            raise StorageError(f"{what}, for {waited:.0f} s (training.peer_timeout_s); {remedy}")
        if waited >= self._next_word:
            self._next_word = waited + EVERY_S
            left = self._timeout_s - waited
            logger.warning("%s; waiting for up to %.0f s more; %s", what, left, remedy)
        time.sleep(0.05)
