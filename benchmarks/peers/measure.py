"""Counting what a loader delivers, by the clock and by CPU time; no peer and no torch in here.

Our own loader is measured by the same functions.
"""

import os
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A measured stretch.

    Attributes:
        samples: delivered in it.
        seconds: wall time.
        cpu_seconds: of this process and all its descendants.
        server_cpu_seconds: of the processes of a server that it read from.
        epochs: ends of an epoch that fell into it; their pauses are part of the wall time.
    """

    samples: int
    seconds: float
    cpu_seconds: float
    epochs: int
    server_cpu_seconds: float = 0.0


def measure(
    loader: Iterable[Any], *, warmup_s: float, seconds: float, server_pids: Sequence[int] = ()
) -> Measured:
    """Take batches, epoch after epoch, and count those that arrive after the warm-up.

    The warm-up begins at the first batch, so that starting workers is never counted. Batches are
    pairs or tuples whose first member has the length of the batch.
    """
    first = mark = None
    cpu = server = 0.0
    samples = epochs = 0
    while True:
        delivered = False
        for batch in loader:
            now, delivered = time.perf_counter(), True
            first = now if first is None else first
            if mark is None:
                # The batch that ends the warm-up was made in it.
                if now - first >= warmup_s:
                    mark, cpu, server = now, cpu_seconds(), cpu_of(server_pids)
                continue
            samples += len(batch[0])
            if now - mark >= seconds:
                used, served = cpu_seconds() - cpu, cpu_of(server_pids) - server
                return Measured(samples, now - mark, used, epochs, served)
        if not delivered:
            raise SystemExit("the loader delivers nothing")
        epochs += mark is not None


def digest_epoch(loader: Iterable[Any]) -> dict[str, Any]:
    """One epoch: how many samples, and sums of checksums that any order leaves alike."""
    samples = images = labels = 0
    for image, label in loader:
        for pixels, row in zip(image.numpy(), label.numpy(), strict=True):
            images += zlib.crc32(pixels.tobytes())
            labels += zlib.crc32(row.tobytes())
            samples += 1
    return {"samples": samples, "images": f"{images:x}", "labels": f"{labels:x}"}


def cpu_seconds() -> float:
    """User and system time of this process and its descendants, living and reaped; 10 ms steps."""
    parent: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is a name in brackets that may hold anything.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parent[int(path.parent.name)] = int(fields[1])
        ticks[int(path.parent.name)] = sum(map(int, fields[11:15]))
    mine = {os.getpid()}
    found = True
    while found:
        found = {pid for pid, above in parent.items() if above in mine} - mine
        mine |= found
    return sum(ticks.get(pid, 0) for pid in mine) / os.sysconf("SC_CLK_TCK")


def cpu_of(pids: Sequence[int]) -> float:
    """User and system time of some processes so far; 10 ms steps."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def warm_page_cache(folder: Path) -> int:
    """Read every file below a folder once; returns bytes."""
    size = 0
    for path in sorted(folder.resolve().rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                while piece := file.read(1 << 22):
                    size += len(piece)
    return size
