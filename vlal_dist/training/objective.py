"""Inputs of the loss in training: Omega_o on the device, the draw's seed and weights.

Also the ignored pairs of PSL and of the top-k ablation, which the operator does not choose itself.

Shapes: B rows of a micro-batch, N rows of the global batch, A attributes, O objects.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig
from vlal_dist.data.loading.batch import Batch
from vlal_dist.errors import DataError
from vlal_dist.kernels.arguments import FeasibleTable
from vlal_dist.kernels.reference import dense_rows, feasible_rows
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.method.ignore_set import psl_ignored, top_ignore_set
from vlal_dist.training.ranks import Ranks


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
            does not check ids.
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
    """The batch with infinite inverse weights, by which nothing can be drawn.

    Args:
        batch: on the CPU.
        set_size: int64 [O], |Omega_o|, on the CPU.
    """
    indptr = torch.zeros(len(batch) + 1, dtype=torch.int64)
    torch.cumsum(set_size[batch.object_id], 0, out=indptr[1:])
    weight = torch.full((int(indptr[-1]),), torch.inf)
    return replace(batch, weight_indptr=indptr, inverse_weight=weight)


def dummy_batch(empty: Batch) -> Batch:
    """One row of zeros and weight 0, shaped like the rows of a batch that has none."""
    rows = {name: t.new_zeros((1, *t.shape[1:])) for name, t in empty.tensors().items()}
    return replace(empty, **rows)  # type: ignore[arg-type]


def top_pairs(loss: LossConfig, batch: Batch, feasible: FeasibleTable) -> Tensor:
    """The attributes of the drawing set with the greatest weights, bool [B, A].

    Args:
        loss: its `num_ignore` and `draw_over` are used.
        batch: with weights.
        feasible: Omega_o of all objects, on the device.
    """
    assert batch.inverse_weight is not None
    attributes = batch.label.shape[1]
    rows = feasible_rows(feasible.indptr, feasible.indices, batch.object_id)
    drawable = dense_rows(*rows, attributes, None)
    if loss.draw_over == "unannotated":
        drawable &= batch.label == 0
    return top_ignore_set(
        inverse_weight=dense_rows(*rows, attributes, batch.inverse_weight),
        drawable=drawable,
        num_ignore=loss.num_ignore,
    )


def psl_pairs(
    loss: LossConfig,
    prior: Tensor,
    logits: Tensor,
    unannotated: Tensor,
    index: npt.NDArray[np.int64],
    ranks: Ranks,
) -> Tensor:
    """PSL's ignored pairs of this rank's rows, bool [B, A]; every rank must call.

    Rows of all ranks are put into the epoch's order, so that the number of ranks changes nothing.

    Args:
        loss: thresholds and margin.
        prior: floating [A], mean probability of each attribute over training.
        logits: [B, A].
        unannotated: bool [B, A].
        index: position within the epoch of each real row; none for a dummy row.
        ranks: those that share the global batch.
    """
    rows = len(index)  # 0 for a dummy row, which is not sent
    own = torch.as_tensor(index, device=logits.device)
    probability = torch.sigmoid(logits.detach().float())[:rows]
    position = torch.cat(ranks.gather(own))
    order = position.argsort()
    chosen = psl_ignored(
        probability=torch.cat(ranks.gather(probability))[order],
        unannotated=torch.cat(ranks.gather(unannotated[:rows].to(torch.uint8)))[order].bool(),
        prior=prior.to(logits.device),
        loss=loss,
    )
    ignored = torch.zeros_like(unannotated)
    ignored[:rows] = chosen[torch.searchsorted(position[order], own)]
    return ignored
