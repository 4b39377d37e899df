"""The visits of a step, and how ranks and micro-batches share them (docs/stream.md)."""

from dataclasses import dataclass

import numpy as np

from vlal_dist.data.hashing import I64


def choose_micro_batches(*, lanes: int, world_size: int, accumulation: int) -> int:
    """M: the largest divisor of `lanes` not above world size x accumulation."""
    most = world_size * accumulation
    return max(m for m in range(1, min(lanes, most) + 1) if lanes % m == 0)


def micro_batches_per_rank(*, micro_batches: int, world_size: int) -> int:
    """Forward passes of each rank in each step: ceil(M / W)."""
    return -(-micro_batches // world_size)


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of one step.

    Attributes:
        start: first position of the step in the epoch.
        samples: visits of the whole step, over all ranks.
        micro_batches: positions of each of this rank's micro-batches, in order; possibly none.
    """

    start: int
    samples: int
    micro_batches: list[I64]


def plan_step(
    *, start: int, samples: int, lanes: int, micro_batches: int, rank: int, world_size: int
) -> StepPlan:
    """Cut the step [start, start + samples) into this rank's micro-batches.

    Position i belongs to micro-batch i mod M. When W divides M, rank r runs the micro-batches
    m = r mod W; otherwise it cuts its rows, those of the lanes l = r mod W, into ceil(M / W)
    micro-batches of nearly equal size.
    """
    taken = np.arange(start, start + samples, dtype=np.int64)
    if micro_batches % world_size == 0:
        own = [taken[taken % micro_batches == m] for m in range(rank, micro_batches, world_size)]
    else:
        mine = taken[(taken % lanes) % world_size == rank]
        count = micro_batches_per_rank(micro_batches=micro_batches, world_size=world_size)
        own = [part.astype(np.int64) for part in np.array_split(mine, count)]
    return StepPlan(start=start, samples=samples, micro_batches=own)


def epoch_samples(*, num_samples: int, batch_size: int, epoch_end: str) -> int:
    """Visits of an epoch that are trained on: all, or without the incomplete last batch."""
    return num_samples if epoch_end == "exact" else num_samples // batch_size * batch_size
