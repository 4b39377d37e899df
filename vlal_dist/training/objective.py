"""What is minimised: a row of Table 1, its choice of ignored pairs, and the scale of the sum.

The objective is (reference_batch / B) x the sum over the global batch of the sum over attributes,
B the configured batch also where the last one is shorter: at B = 64 the authors' plain sum.

Shapes: B rows of a micro-batch, N rows of the global batch, A attributes, O objects.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlal_dist.data.loading.batch import Batch
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.kernels.arguments import Draw, FeasibleTable
from vlal_dist.kernels.reference import dense_rows, feasible_rows
from vlal_dist.kernels.selective_loss import Kernel, Treatment
from vlal_dist.method.baselines import LossSettings, psl_ignored
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.method.ignore_set import top_ignore_set
from vlal_dist.training.ranks import Ranks


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        loss: gammas and treatment of unannotated pairs (a row of Table 1).
        margin, detach_focal: as `selective_loss` takes them.
        num_ignore: NUM_IGNORE; None: all of the drawing set.
        draw_over: `feasible` or `unannotated` (feasible ones).
        draw: `random` (Fig. 3), or `top`: those of the greatest weight.
        seed: of the draws, any integer; its low 64 bits count.
        kernel: what computes it: the fastest backend (`auto`), or the readable `reference`.
        batch_size: B, rows of the configured global batch.
        reference_batch: B at which the objective is the authors' plain sum.
        psl_prior: floating [A], for PSL.
        psl_threshold, psl_top_k: as `psl_ignored` takes them.
    """

    loss: LossSettings
    margin: float
    detach_focal: bool
    num_ignore: int | None
    draw_over: str
    seed: int
    kernel: Kernel
    batch_size: int
    reference_batch: int
    draw: str = "random"
    psl_prior: Tensor | None = None
    psl_threshold: float = 0.5
    psl_top_k: int = 5

    @property
    def scale(self) -> float:
        """Factor of the sum over rows."""
        return self.reference_batch / self.batch_size


def feasible_table(
    sets: FeasibleSets, *, num_objects: int, num_attributes: int, device: torch.device
) -> FeasibleTable:
    """Omega_o of all objects, once on the device.

    Args:
        sets: as the dataset holds them.
        num_objects, num_attributes: O and A of the vocabulary.
        device: where the logits are.

    Raises:
        DataError: the sets are of other objects, or name an attribute beyond A: the operator
            looks ids up without a check.
    """
    beyond = int(sets.indices.max(initial=-1))
    if sets.num_objects != num_objects or beyond >= num_attributes:
        raise DataError(
            f"feasible.npz holds {sets.num_objects} objects and attributes up to {beyond}, the "
            f"vocabulary {num_objects} objects and {num_attributes} attributes; pack again"
        )
    indptr, indices = (torch.from_numpy(a).to(device) for a in (sets.indptr, sets.indices))
    return FeasibleTable(indptr, indices, int(np.diff(sets.indptr).max(initial=0)))


def seed_bits(seed: int, device: torch.device) -> Tensor:
    """The low 64 bits of a seed as the operator takes them: int64 [1], two's complement."""
    low = seed % 2**64
    return torch.tensor([low - 2**64 if low >= 2**63 else low], device=device)


def undrawable(batch: Batch, set_size: Tensor) -> Batch:
    """The batch with weights of 0, by which nothing can be drawn.

    Args:
        batch: on the CPU.
        set_size: int64 [O], |Omega_o|, on the CPU.
    """
    indptr = torch.zeros(len(batch) + 1, dtype=torch.int64)
    torch.cumsum(set_size[batch.object_id], 0, out=indptr[1:])
    return replace(batch, weight_indptr=indptr, inverse_weight=torch.zeros(int(indptr[-1])))


def choose_ignored(
    objective: Objective,
    logits: Tensor,
    batch: Batch,
    *,
    seed: Tensor,
    index: npt.NDArray[np.int64],
    ranks: Ranks,
    feasible: FeasibleTable,
) -> Draw | Tensor | Treatment:
    """Omega_Ignore: what Fig. 3 draws it from, or what the baseline of Table 1 says.

    Args:
        objective: which.
        logits: [B, A]; only PSL looks at them.
        batch: the micro-batch; with weights where the objective draws.
        seed: of the draws (`seed_bits`), on the device.
        index: position within the epoch of each real row; none for a dummy row.
        ranks: PSL chooses over the batches of all of them, so that all must call.
        feasible: Omega_o of all objects, on the device.

    Returns:
        What the operator takes as `ignored`: for the selective loss the draw, which happens
        inside, or the top attributes, bool [B, A]; for PSL its pairs, bool [B, A]; else `ignore`
        or `negatify`.
    """
    treatment = objective.loss.unannotated
    if treatment == "psl":
        return _choose_psl(objective, logits, batch.label == 0, index, ranks)
    if treatment != "select":
        return treatment
    assert batch.weight_indptr is not None and batch.inverse_weight is not None
    if objective.draw == "top":
        return _top(objective, batch, feasible)
    return Draw(
        weight_indptr=batch.weight_indptr,
        inverse_weight=batch.inverse_weight,
        num_ignore=-1 if objective.num_ignore is None else objective.num_ignore,
        over_unannotated=objective.draw_over == "unannotated",
        uid=batch.uid,
        visit=batch.visit,
        seed=seed,
    )


def _top(objective: Objective, batch: Batch, feasible: FeasibleTable) -> Tensor:
    """The attributes of the drawing set with the greatest weights, bool [B, A]."""
    assert batch.inverse_weight is not None
    attributes = batch.label.shape[1]
    rows = feasible_rows(feasible.indptr, feasible.indices, batch.object_id)
    drawable = dense_rows(*rows, attributes, None)
    if objective.draw_over == "unannotated":
        drawable &= batch.label == 0
    return top_ignore_set(
        inverse_weight=dense_rows(*rows, attributes, batch.inverse_weight),
        drawable=drawable,
        num_ignore=objective.num_ignore,
    )


def check_psl(objective: Objective, micro_batches: int) -> None:
    """Refuse what PSL cannot do.

    Raises:
        ConfigError: no prior, or more than one micro-batch per rank and step.
    """
    if objective.psl_prior is None:
        raise ConfigError(
            "method.loss psl needs method.psl_prior: the attributes.parquet that "
            "`evaluate --evaluation.split train` writes for the CE-ignoring model of this seed"
        )
    if micro_batches > 1:
        raise ConfigError(
            f"method.loss psl chooses over the whole batch, but each rank runs {micro_batches} "
            "micro-batches per step; set training.accumulation 1, and resume with as many ranks "
            "as at the first start"
        )


def _choose_psl(
    objective: Objective,
    logits: Tensor,
    unannotated: Tensor,
    index: npt.NDArray[np.int64],
    ranks: Ranks,
) -> Tensor:
    """PSL's pairs: rows of all ranks are laid in the epoch's order, so that W changes nothing."""
    assert objective.psl_prior is not None
    rows = len(index)  # 0 for a dummy row, which is not sent
    own = torch.as_tensor(index, device=logits.device)
    probability = torch.sigmoid(logits.detach().float())[:rows]
    position = torch.cat(ranks.gather(own))
    order = position.argsort()
    chosen = psl_ignored(
        probability=torch.cat(ranks.gather(probability))[order],
        unannotated=torch.cat(ranks.gather(unannotated[:rows].to(torch.uint8)))[order].bool(),
        prior=objective.psl_prior.to(logits.device),
        threshold=objective.psl_threshold,
        top_k=objective.psl_top_k,
        margin=objective.margin,
    )
    ignored = torch.zeros_like(unannotated)
    ignored[:rows] = chosen[torch.searchsorted(position[order], own)]
    return ignored
