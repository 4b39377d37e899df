"""Process group: joining it, and the collectives that training uses besides gradients.

Works the same under `deepspeed`, `torchrun` and plain `python`. Flags and counts use a gloo group
of their own, so that they need no accelerator. No object is pickled.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from vlal_dist.errors import ConfigError, DataError, StorageError, VlalError
from vlal_dist.training.rendezvous import PORT_REMEDY, meet, read_place

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: W, processes in all.
        local_rank: place among the processes of this machine.
        device: where the model lives.
        control: gloo group for flags; None when there is a single rank.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is true on any rank; every rank must call, and gets the same."""
        if self.control is None:
            return flags
        votes = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(vote) for vote in votes.tolist())

    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's part of some work; if it fails on any rank, every rank raises.

        Raises:
            VlalError: this rank's own error, or one with the highest exit code of the others'.
        """
        failure: Exception | None = None
        try:
            done = work()
        except Exception as error:  # of any kind: the others must not wait for this rank
            failure = error
        own = failure.exit_code if isinstance(failure, VlalError) else int(failure is not None)
        worst = torch.tensor([own])
        if self.control is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.control)
        if failure is not None:
            raise failure
        if code := int(worst):
            kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, StorageError)}
            raise kinds.get(code, VlalError)("another rank failed; its own message says why")
        return done

    def total(self, *values: int) -> list[int]:
        """Sums over ranks of integers of at most 32 bits each; every rank must call."""
        totals = torch.tensor(values, dtype=torch.int64)
        if self.control is not None:
            dist.all_reduce(totals, group=self.control)
        return [int(value) for value in totals.tolist()]

    def texts(self, own: str) -> list[str]:
        """The texts of all ranks, in rank order; every rank must call."""
        data = torch.tensor(list(own.encode()), dtype=torch.uint8, device=self.device)
        return [bytes(part.cpu().numpy()).decode() for part in self.gather(data)]

    def check_equal(self, values: Mapping[str, object], *, remedy: str) -> None:
        """Refuse to go on where the ranks have different values; every rank must call.

        Args:
            values: name -> value of this rank, as JSON.
            remedy: closes the message.

        Raises:
            DataError: on every rank the same, naming what differs and which ranks have what.
        """
        all_values = [json.loads(text) for text in self.texts(json.dumps(values))]
        differing = []
        for name in dict.fromkeys(name for one in all_values for name in one):
            holders: dict[str, list[int]] = {}
            for rank, one in enumerate(all_values):
                holders.setdefault(json.dumps(one.get(name)), []).append(rank)
            if len(holders) > 1:
                groups = (f"{_ranks_named(ranks)} {text}" for text, ranks in holders.items())
                differing.append(f"{name}: {'; '.join(groups)}")
        if differing:
            raise DataError(f"the ranks do not train the same: {'. '.join(differing)}. {remedy}")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, on `device`."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The rows [n_r, ...] of all ranks, in rank order.

        n_r may differ (shorter parts are padded in transit), the rest of the shape may not.
        """
        if self.world_size == 1:
            return [rows]
        counts = [rows.new_zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        most = max(int(count) for count in counts)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]


def join_ranks(*, threads: int, timeout_s: float, stopped: Callable[[], bool]) -> Ranks:
    """Join the process group that the launcher's variables describe; without them a single rank.

    Args:
        threads: torch threads of this process; 0: cores / processes on this machine.
        timeout_s: longest wait for another rank, at the start and in each collective.
        stopped: whether this process was asked to stop; asked while it waits for the others.

    Raises:
        ConfigError: the launcher's variables are incomplete or wrong.
        StorageError: the ranks cannot connect, or not all of them come.
        Stopped: `stopped` says so.
    """
    place = read_place()
    torch.set_num_threads(threads or max(1, _cores() // place.local_size))
    device = _device(place.local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.world_size == 1:
        # An in-process store, so that nothing listens on any port.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return Ranks(0, 1, place.local_rank, device, None)
    if place.one_machine and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: stay on loopback
    timeout = timedelta(seconds=timeout_s)
    # DeepSpeed makes groups of its own with torch's default timeout, half an hour. torch has no
    # public way to change it; tests/reliability/test_peers.py tests this.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    rendezvous = meet(place, timeout_s=timeout_s, stopped=stopped)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", rendezvous),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistNetworkError as error:
        raise StorageError(f"ranks cannot connect: {error}; {PORT_REMEDY}") from None
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(place.rank, place.world_size, place.local_rank, device, control)


def _ranks_named(ranks: Sequence[int]) -> str:
    """Such as `ranks 0, 2 have`; of many the first ones and their number."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}{'' if len(ranks) <= 8 else f' and {len(ranks) - 8} more'} have"


@contextmanager
def peers_needed() -> Iterator[None]:
    """Translate gloo's and NCCL's errors of a collective, whose peer has died or hangs.

    Raises:
        VlalError: instead.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise VlalError(
            f"another rank died, or hung for longer than training.peer_timeout_s ({first}); its "
            "own log may say why. The same command resumes from the last checkpoint"
        ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; start "
            "as many ranks as GPUs, or export DS_ACCELERATOR=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
