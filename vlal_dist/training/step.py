"""BatchNorm's running statistics across ranks and dummy rows (design 8).

Every rank normalises by its own micro-batch; only the running statistics that evaluation uses are
made equal, after every step, so that a save or an evaluation at any step changes nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vlal_dist.data.loading.batch import Batch, on_device
from vlal_dist.data.loading.loader import Step
from vlal_dist.errors import DataError
from vlal_dist.kernels.arguments import FeasibleTable
from vlal_dist.kernels.selective_loss import selective_loss
from vlal_dist.method.selective_loss import LossTerms, Term
from vlal_dist.training.engine import Engine
from vlal_dist.training.objective import (
    Objective,
    check_psl,
    choose_ignored,
    seed_bits,
    undrawable,
)
from vlal_dist.training.ranks import Ranks, name_uids


def running_statistics(model: nn.Module) -> list[Tensor]:
    """running_mean and running_var of every BatchNorm layer, in the model's order.

    `num_batches_tracked` is left out: with a fixed momentum nothing reads it, and as each rank runs
    equally many micro-batches it is equal everywhere anyway.
    """
    return [
        buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    ]


def average_statistics(statistics: list[Tensor], ranks: Ranks) -> None:
    """Replace each statistic by its mean over ranks; one flat all-reduce, nothing for one rank."""
    if ranks.world_size == 1 or not statistics:
        return
    flat = ranks.sum(torch.cat([tensor.flatten() for tensor in statistics])) / ranks.world_size
    means = torch.split(flat, [tensor.numel() for tensor in statistics])
    for tensor, mean in zip(statistics, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


@contextmanager
def restored_statistics(statistics: list[Tensor]) -> Iterator[None]:
    """Undo what a forward pass inside does to the statistics; for dummy rows.

    The backward pass belongs inside too: autograd refuses buffers that changed before it.
    """
    before = [tensor.clone() for tensor in statistics]
    yield
    for tensor, old in zip(statistics, before, strict=True):
        tensor.copy_(old)


class StepClock:
    """Times the two parts of steps; nothing waits for a device because of it.

    On a CPU every step, by the monotonic clock. A GPU works behind the host's clock: there events
    go into its stream, in some steps only, and are read once the device has passed them.

    Args:
        device: where the model lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._timing = False
        self._marks: list[Any] = []
        self._times: list[tuple[float, float]] = []

    def begin(self, *, sampled: bool) -> None:
        """A step's first pass begins.

        Args:
            sampled: whether to time the step on a GPU, too.
        """
        self._timing, self._marks = sampled or not self._on_gpu, []
        self.mark()

    def mark(self) -> None:
        """A part ends: first the passes, then the sum."""
        if not self._timing:
            return
        if not self._on_gpu:
            self._marks.append(time.monotonic())
            self._settle()
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def take(self) -> list[tuple[float, float]]:
        """(seconds of the passes, seconds of the sum) of each step timed since the last call.

        On a GPU a step is in it once the device has finished both.
        """
        if self._on_gpu and self._marks and self._marks[-1].query():
            self._settle()
        taken, self._times = self._times, []
        return taken

    def _settle(self) -> None:
        """Turn the marks of a whole step into seconds."""
        if len(self._marks) < 3:
            return
        begin, passed, summed = self._marks
        self._times.append((self._seconds(begin, passed), self._seconds(passed, summed)))
        self._marks = []

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin)


@dataclass(frozen=True)
class Tally:
    """Sums over rows of some steps.

    Attributes:
        loss: float64 [5], unscaled loss by `Term`.
        pairs: float64 [5], number of pairs by `Term`; whole numbers.
        rows: float64 [1], number of rows.
    """

    loss: Tensor
    pairs: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "Tally":
        """All zero."""
        five, one = (torch.zeros(n, dtype=torch.float64, device=device) for n in (5, 1))
        return cls(five, five.clone(), one)

    def add(self, terms: LossTerms, rows: int) -> None:
        """Count a micro-batch, on the device and without waiting for it."""
        self.loss.add_(terms.sums)
        self.pairs.add_(terms.counts)
        self.rows.add_(rows)

    def over_ranks(self, ranks: Ranks) -> "Tally":
        """The sum over ranks; every rank must call."""
        loss, pairs, rows = torch.split(
            ranks.sum(torch.cat([self.loss, self.pairs, self.rows])), [5, 5, 1]
        )
        return Tally(loss, pairs, rows)

    def per_row(self) -> dict[str, float]:
        """Mean loss of a row, in total and by term, and how many pairs of a row were ignored."""
        rows = max(float(self.rows), 1.0)
        losses = (self.loss / rows).tolist()
        means = {"loss": sum(losses)}
        means.update({f"loss_{t.name.lower()}": losses[t] for t in Term if t is not Term.IGNORED})
        means["ignored_effective"] = float(self.pairs[Term.IGNORED]) / rows
        return means


class TrainStep:
    """Runs steps on the engine of this rank.

    Args:
        engine: the model and its optimizer.
        ranks: this process among its peers.
        objective: what is minimised.
        feasible: Omega_o of all objects, on the ranks' device.
        micro_batches: forward passes of this rank in a step.

    Raises:
        ConfigError: PSL with more than one micro-batch per step, or without a prior.
    """

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        *,
        objective: Objective,
        feasible: FeasibleTable,
        micro_batches: int,
    ) -> None:
        if objective.loss.unannotated == "psl":
            check_psl(objective, micro_batches)
        self.engine, self.ranks, self.objective = engine, ranks, objective
        self.feasible, self.seed = feasible, seed_bits(objective.seed, ranks.device)
        self._set_size = feasible.indptr.diff().cpu()
        self.statistics = running_statistics(engine.module)
        self.tally = Tally.empty(ranks.device)
        self.clock = StepClock(ranks.device)
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._grad_norm: Tensor | None = None

    def accumulate(self, step: Step, *, sampled: bool = False) -> None:
        """Forward and backward passes of a step; the gradient is then the global one.

        Args:
            step: this rank's rows.
            sampled: whether the clock also looks at a GPU.
        """
        self._rows = []
        last = len(step.micro_batches) - 1
        self.clock.begin(sampled=sampled)
        for number, batch in enumerate(step.micro_batches):
            self._micro_batch(batch, step.sample_index[number], last=number == last)
        self.clock.mark()
        self.engine.reduce()
        self.clock.mark()

    def is_finite(self) -> bool:
        """Whether the accumulated losses and (ZeRO 0) the summed gradient are finite."""
        checks = [per_row.isfinite().all() for _, per_row in self._rows]
        if gradients := self.engine.gradients():
            self._grad_norm = torch.nn.utils.get_total_norm(gradients)
            checks.append(self._grad_norm.isfinite())
        return bool(torch.stack(checks).all())

    def grad_norm(self) -> float | None:
        """Norm of the last step's summed gradient (ZeRO 0), computed already by `is_finite`."""
        return None if self._grad_norm is None else float(self._grad_norm)

    def refuse(self, step: int) -> None:
        """Raise for a step that is not finite; every rank must call.

        Raises:
            DataError: naming the uids of the rows at fault.
        """
        bad = [int(u) for uid, per_row in self._rows for u in uid[~per_row.isfinite()].tolist()]
        named = [uid % 2**64 for uid in name_uids(self.ranks, bad)]
        which = f"rows with uid {named}" if named else "no single row, but the gradient"
        raise DataError(
            f"step {step + 1}: the loss is not finite in {which}; nothing was applied. Look at "
            "these samples with shard_tools inspect, or lower training.lr_new"
        )

    def apply(self) -> None:
        """The optimizer step; then BatchNorm's running statistics are averaged over ranks."""
        self.engine.step()
        average_statistics(self.statistics, self.ranks)

    def take_tally(self) -> Tally:
        """Sums since the last call."""
        taken, self.tally = self.tally, Tally.empty(self.ranks.device)
        return taken

    def take_times(self) -> list[tuple[float, float]]:
        """(seconds of own passes, seconds of the sum over ranks) of the steps timed since.

        Empty where the sum is not apart from the passes (ZeRO 1 and 2).
        """
        times = self.clock.take()
        return times if self.engine.reduces_apart else []

    def _micro_batch(self, batch: Batch, index: npt.NDArray[np.int64], *, last: bool) -> None:
        if len(batch):
            if batch.inverse_weight is None and self.objective.loss.unannotated == "select":
                batch = undrawable(batch, self._set_size)
            self._forward_backward(on_device(batch, self.ranks.device), index, last=last)
            return
        # A rank without rows still takes part in the reduction: with one row of weight 0.
        with restored_statistics(self.statistics):
            dummy = undrawable(dummy_batch(batch), self._set_size)
            self._forward_backward(on_device(dummy, self.ranks.device), index, last=last)

    def _forward_backward(self, batch: Batch, index: npt.NDArray[np.int64], *, last: bool) -> None:
        logits = self.engine(batch.image, batch.object_id)
        ignored = choose_ignored(
            self.objective,
            logits,
            batch,
            seed=self.seed,
            index=index,
            ranks=self.ranks,
            feasible=self.feasible,
        )
        loss = selective_loss(
            logits,
            label=batch.label,
            object_id=batch.object_id,
            feasible=self.feasible,
            ignored=ignored,
            gammas=self.objective.loss.gammas,
            margin=self.objective.margin,
            detach_focal=self.objective.detach_focal,
            row_weight=batch.row_weight,
            kernel=self.objective.kernel,
        )
        self.engine.backward(self.objective.scale * loss.per_row.sum(), last=last)
        self.tally.add(loss, len(index))
        self._rows.append((batch.uid, loss.per_row.detach()))


def dummy_batch(empty: Batch) -> Batch:
    """One row of zeros and weight 0, shaped like the rows of a batch that has none.

    What it could draw from is left to `undrawable`.
    """
    rows = {name: t.new_zeros((1, *t.shape[1:])) for name, t in empty.tensors().items()}
    return replace(empty, **rows)  # type: ignore[arg-type]
