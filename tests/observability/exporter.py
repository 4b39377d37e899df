"""Ranks that say what real ones say, without training: for tests of whatever reads it.

As a program, `python -m tests.observability.exporter FOLDER RANK`: serves, announces itself there
as a rank of run `r`, counts ten steps a second, and never ends.
"""

import sys
import time
from pathlib import Path

from vlal_dist.observability.metrics import TrainMetrics
from vlal_dist.observability.names import (
    ATTRIBUTE_STATUS,
    LOADER,
    LOSS_TERMS,
    S3_REASONS,
    SAVE_FAILURES,
    TERM_KINDS,
    Readings,
)
from vlal_dist.observability.targets import Target

BUILD = {"version": "0.1", "torch": "2", "deepspeed": "0", "kernel": "cpu"}
GROUPS = (
    "overall", "head", "medium", "tail", "color", "material", "shape", "size", "texture",
    "action", "state", "others",
)  # fmt: skip
ROWS = 5


class Exporter:
    """One rank, and how many steps it pretends to have done."""

    def __init__(self) -> None:
        self.steps = 0
        self.metrics = TrainMetrics(BUILD, read=self.readings)

    def readings(self) -> Readings:
        return {
            ("vlal_s3_requests_total",): 10.0 * self.steps,
            **{("vlal_s3_retries_total", reason): 1.0 * self.steps for reason in S3_REASONS},
            ("vlal_s3_bytes_total", "in"): 1e6 * self.steps,
            ("vlal_s3_bytes_total", "out"): 1e3 * self.steps,
            ("vlal_disk_free_bytes", "cache"): 1e9,
            ("vlal_disk_free_bytes", "run"): 1e12,
        }

    def begin(self) -> None:
        """As a start from a checkpoint."""
        self.metrics.resumed("exact")
        self.metrics.state("training")

    def step(self) -> None:
        """A step, at the end of a log interval."""
        self.steps += 1
        self.metrics.step(epoch=3, step=self.steps, rows=ROWS, wait_s=0.002, duration_s=0.2)
        self.metrics.times([(0.15, 0.02)])
        self.metrics.interval(
            loss=dict.fromkeys(LOSS_TERMS, 2.5),
            rates={"head": 7e-4, "backbone": 1e-5},
            term_counts=dict.fromkeys(TERM_KINDS, 4),
            ignored=10.5,
            grad_norm=0.5,
            visits={"trained": ROWS * self.steps, "left_out": 0},
            quarantined=1,
        )
        prefix = "vlal_loader_"
        names = (name.removeprefix(prefix).removesuffix("_total") for name in LOADER)
        self.metrics.loader({name: self.steps for name in names if name != "wait_seconds"})

    def rarely(self) -> None:
        """What happens now and then: a validation, checkpoints, one of each failure."""
        self.metrics.validation(
            split="val",
            mean_ap=dict.fromkeys(GROUPS, 0.25),
            attributes=dict.fromkeys(ATTRIBUTE_STATUS, 7),
        )
        self.metrics.saved(seconds=1.5, size_bytes=2_000_000)
        for reason in SAVE_FAILURES:
            self.metrics.save_failed(reason)
        self.metrics.refused()
        self.metrics.stopped_by("SIGTERM")
        self.metrics.tracker_dropped("mlflow", 2)


def main(folder: Path, rank: int) -> None:
    exporter = Exporter()
    port = exporter.metrics.serve(host="127.0.0.1", port=29400)
    assert port is not None
    exporter.begin()
    exporter.rarely()
    Target(folder, run="r", role="train", rank=rank).write(host="127.0.0.1", port=port)
    while True:
        exporter.step()
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
