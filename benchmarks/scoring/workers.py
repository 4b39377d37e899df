"""Measured workers: each process on a core of its own, all starting together.

They meet in a folder: the first to come takes the first core, and none goes on before all have
come. `PinnedActor` is in this module so that Ray's workers can import it by name.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.harness import pin
from vlal_dist.scoring.identity import ScoreSettings, ScoringJob, stored_settings
from vlal_dist.scoring.ray_cluster import ScoringActor
from vlal_dist.storage.store import open_store

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


def choose_cores(number: int) -> tuple[tuple[int, ...], list[int]]:
    """The last `number` cores, to measure on, and the others; all, where no other is left."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < number:
        raise SystemExit(f"{number} cores are needed, {len(allowed)} may be used")
    return tuple(allowed[-number:]), allowed[:-number] or allowed


def settings_of(job: ScoringJob) -> ScoreSettings:
    """The settings stored in the prepared score root."""
    settings = stored_settings(open_store(job.scores), job)
    assert settings is not None
    return settings


class PinnedActor(ScoringActor):
    """Our actor, which takes a core, opens, reads the text bank, and waits for the others."""

    def open(self) -> int:
        """See `ScoringActor.open`."""
        folder = Path(self.job.scores).parent
        places = Places(folder, tuple(json.loads((folder / "cores.json").read_text())))
        places.take()
        pid = super().open()
        self.scorer.prepare_text(settings_of(self.job))
        places.wait()
        return pid
