"""One training step: logits, ignore set, loss, gradient, sum over ranks, update (Section 2).

The objective is (reference_batch / B) x the sum over the global batch of the sum over attributes,
B the configured batch also where the last one is shorter: at B = 64 the authors' plain sum
(docs/method.md).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vlal_dist.config.sections import LossConfig, TrainingConfig
from vlal_dist.data.loading.batch import Batch, on_device
from vlal_dist.data.loading.loader import Step
from vlal_dist.errors import DataError
from vlal_dist.kernels.arguments import Draw, FeasibleTable
from vlal_dist.kernels.operator import selective_loss
from vlal_dist.method.selective_loss import LossTerms, Term
from vlal_dist.training.engine import Engine
from vlal_dist.training.objective import (
    dummy_batch,
    psl_pairs,
    seed_bits,
    top_pairs,
    undrawable,
)
from vlal_dist.training.ranks import Ranks


class TrainStep:
    """Runs steps on the engine of this rank.

    Args:
        engine: the model and its optimizer.
        ranks: this process among its peers.
        loss: what is minimised.
        training: its `seed`, `kernel`, `batch_size` and `reference_batch` are used.
        feasible: Omega_o of all objects, on the ranks' device.
        psl_prior: floating [A], mean probability of each attribute over training, for PSL.
    """

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        *,
        loss: LossConfig,
        training: TrainingConfig,
        feasible: FeasibleTable,
        psl_prior: Tensor | None = None,
    ) -> None:
        self.engine, self.ranks, self.loss, self.training = engine, ranks, loss, training
        self.feasible, self.psl_prior = feasible, psl_prior
        self.scale = training.reference_batch / training.batch_size
        self.seed = seed_bits(training.seed, ranks.device)
        self.statistics = running_statistics(engine.module)
        self.tally = Tally.empty(ranks.device)
        self.clock = StepClock(ranks.device)
        self._set_size = feasible.indptr.diff().cpu()
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._grad_norm: Tensor | None = None

    def accumulate(self, step: Step, *, sampled: bool = False) -> None:
        """Forward and backward passes of a step; the gradient is then the global one.

        Args:
            step: this rank's rows.
            sampled: whether to time a GPU as well.
        """
        self._rows = []
        last = len(step.micro_batches) - 1
        self.clock.begin(sampled=sampled)
        for number, batch in enumerate(step.micro_batches):
            index = step.sample_index[number]
            if len(batch):
                self._forward_backward(batch, index, last=number == last)
            else:
                # A rank without rows still takes part in the sum, with one row of weight 0.
                with restored_statistics(self.statistics):
                    self._forward_backward(dummy_batch(batch), index, last=number == last)
        self.clock.mark()
        self.engine.reduce()
        self.clock.mark()

    def _forward_backward(self, batch: Batch, index: npt.NDArray[np.int64], *, last: bool) -> None:
        """Sec. 2.1 to 2.3 on one micro-batch; `index`: positions within the epoch of real rows."""
        draws = self.loss.unannotated in ("draw", "top")
        if not len(index) or (draws and batch.inverse_weight is None):
            batch = undrawable(batch, self._set_size)
        batch = on_device(batch, self.ranks.device)
        logits = self.engine(batch.image, batch.object_id)
        terms = selective_loss(
            logits,
            label=batch.label,
            object_id=batch.object_id,
            feasible=self.feasible,
            ignored=self._ignored(logits, batch, index),
            loss=self.loss,
            row_weight=batch.row_weight,
            kernel=self.training.kernel,
        )
        self.engine.backward(self.scale * terms.per_row.sum(), last=last)
        self.tally.add(terms, len(index))
        self._rows.append((batch.uid, terms.per_row.detach()))

    def _ignored(
        self, logits: Tensor, batch: Batch, index: npt.NDArray[np.int64]
    ) -> Draw | Tensor | None:
        """Omega_Ignore as the operator takes it: a draw (Fig. 3), or what a baseline ignores."""
        if self.loss.unannotated == "draw":
            assert batch.weight_indptr is not None and batch.inverse_weight is not None
            weights = (batch.weight_indptr, batch.inverse_weight)
            return Draw(*weights, uid=batch.uid, visit=batch.visit, seed=self.seed)
        if self.loss.unannotated == "top":
            return top_pairs(self.loss, batch, self.feasible)
        if self.loss.unannotated == "psl":
            assert self.psl_prior is not None
            unannotated = batch.label == 0
            return psl_pairs(self.loss, self.psl_prior, logits, unannotated, index, self.ranks)
        return None

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
            DataError: naming the uids of the rows with a loss that is not finite.
        """
        bad = torch.cat([uid[~per_row.isfinite()] for uid, per_row in self._rows])
        named = [uid % 2**64 for uid in torch.cat(self.ranks.gather(bad[:8])).tolist()]
        what = f"the loss is not finite in rows with uid {named}"
        raise DataError(
            f"step {step + 1}: {what if named else 'loss is finite but the gradient is not'}; "
            "nothing was applied. Look at these samples with vlal inspect, or lower "
            "training.lr_new"
        )

    def apply(self) -> None:
        """The optimizer step; then BatchNorm's running statistics are averaged over ranks."""
        self.engine.step()
        average_statistics(self.statistics, self.ranks)

    def take_tally(self) -> "Tally":
        """Sums since the last call."""
        taken, self.tally = self.tally, Tally.empty(self.ranks.device)
        return taken

    def take_times(self) -> list[tuple[float, float]]:
        """(seconds of own passes, seconds of the sum over ranks) of the steps timed since.

        Empty where the sum is not apart from the passes (ZeRO 1 and 2).
        """
        times = self.clock.take()
        return times if self.engine.reduces_apart else []


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
        """No rows."""
        five, one = (torch.zeros(n, dtype=torch.float64, device=device) for n in (5, 1))
        return cls(five, five.clone(), one)

    def add(self, terms: LossTerms, rows: int) -> None:
        """Count a micro-batch, without waiting for the device."""
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


def running_statistics(model: nn.Module) -> list[Tensor]:
    """running_mean and running_var of every BatchNorm layer, in the model's order.

    Every rank normalises by its own micro-batch; only these statistics, which evaluation uses, are
    made equal after every step (docs/training.md). `num_batches_tracked` is left out: with a fixed
    momentum nothing reads it, and it is equal on all ranks anyway.
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
    """Restore the statistics at the end; for the passes of a dummy row.

    The backward pass belongs inside too: autograd refuses buffers that changed before it.
    """
    before = [tensor.clone() for tensor in statistics]
    yield
    for tensor, old in zip(statistics, before, strict=True):
        tensor.copy_(old)


class StepClock:
    """Times the passes and the sum over ranks of steps, without waiting for a device.

    On a CPU every step, by the monotonic clock. A GPU runs asynchronously: there events go into its
    stream, in some steps only, and are read once the device has passed them.

    Args:
        device: where the model lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._timing = False
        self._marks: list[Any] = []
        self._times: list[tuple[float, float]] = []

    def begin(self, *, sampled: bool) -> None:
        """Start of a step's first pass.

        Args:
            sampled: whether to time the step on a GPU as well.
        """
        self._timing, self._marks = sampled or not self._on_gpu, []
        self.mark()

    def mark(self) -> None:
        """End of a part: first of the passes, then of the sum."""
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

        On a GPU a step is included once the device has finished both.
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
        if self._on_gpu:
            seconds = (begin.elapsed_time(passed) / 1000, passed.elapsed_time(summed) / 1000)
        else:
            seconds = (passed - begin, summed - passed)
        self._times.append(seconds)
        self._marks = []
