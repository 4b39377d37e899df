"""Keeps measured processes on cores of their own, and lets them start together.

They meet in a folder: in it, the first to come takes the first core, and none goes on before all
have come.
"""

import json
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

LONGEST_S = 240.0
"""How long a process waits for the others: they may be loading a model on a busy machine."""


@dataclass(frozen=True)
class Places:
    """The cores of one measurement.

    Attributes:
        folder: where its processes meet; fresh.
        cores: one for each process.
    """

    folder: Path
    cores: tuple[int, ...]

    def write(self) -> None:
        """For `read`, in processes that know the folder alone."""
        (self.folder / "cores.json").write_text(json.dumps(self.cores))

    @classmethod
    def read(cls, folder: Path) -> "Places":
        """What `write` wrote."""
        return cls(folder, tuple(json.loads((folder / "cores.json").read_text())))

    def take(self) -> None:
        """Put this process on a core that no other has taken."""
        for core in self.cores:
            try:
                (self.folder / f"core-{core}").mkdir()
            except FileExistsError:
                continue
            pin([core])
            return
        raise SystemExit(f"more processes than cores {self.cores}")

    def wait(self) -> float:
        """Wait until all processes have come here; the clock (`perf_counter`) at that moment."""
        (self.folder / f"ready-{os.getpid()}").touch()
        latest = time.perf_counter() + LONGEST_S
        while len(list(self.folder.glob("ready-*"))) < len(self.cores):
            if time.perf_counter() > latest:
                raise SystemExit(f"only some of {len(self.cores)} processes are ready")
            time.sleep(0.005)
        return time.perf_counter()


def pin(cores: Collection[int]) -> None:
    """Keep every thread of this process on these cores, and all that it starts from now on."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def choose_cores(number: int) -> tuple[tuple[int, ...], list[int]]:
    """The last `number` cores, to measure on, and the others; all, where no other is left."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < number:
        raise SystemExit(f"{number} cores are needed, {len(allowed)} may be used")
    return tuple(allowed[-number:]), allowed[:-number] or allowed
