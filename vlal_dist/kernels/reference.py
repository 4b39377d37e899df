"""The operator by the readable functions of `method/`: any device, and the oracle of the others."""

import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig
from vlal_dist.kernels.arguments import Outputs, Tensors
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.method.selective_loss import assign_terms, selective_loss, selective_slopes


def dense_rows(indptr: Tensor, index: Tensor, columns: int, values: Tensor | None) -> Tensor:
    """A CSR matrix as a dense one.

    Args:
        indptr: int64 [B + 1].
        index: integer [N], the column of each entry.
        columns: A.
        values: [N], or None for True.

    Returns:
        [B, A] of the values' dtype (bool without values); 0 elsewhere.
    """
    rows = len(indptr) - 1
    row = torch.repeat_interleave(
        torch.arange(rows, device=index.device), indptr.diff(), output_size=len(index)
    )
    if values is None:
        values = torch.ones(len(index), dtype=torch.bool, device=index.device)
    dense = values.new_zeros(rows, columns)
    dense[row, index.to(torch.int64)] = values
    return dense


def feasible_rows(indptr: Tensor, index: Tensor, object_id: Tensor) -> tuple[Tensor, Tensor]:
    """Omega_o of each row as CSR: int64 [B + 1], and the attributes."""
    length = indptr.diff()[object_id]
    row_indptr = torch.cat([length.new_zeros(1), length.cumsum(0)])
    total = int(row_indptr[-1])
    shift = torch.repeat_interleave(indptr[object_id] - row_indptr[:-1], length, output_size=total)
    return row_indptr, index[torch.arange(total, device=index.device) + shift]


def run(tensors: Tensors, mode: str, loss: LossConfig) -> Outputs:
    """As `cpu.run`."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    logits, row_weight = given["logits"], given.get("row_weight")
    rows, attributes = logits.shape
    label = given.get("label")
    if label is None:
        code = given["label_code"]
        sign = (code % 2 * 2 - 1).to(torch.int8)
        label = dense_rows(given["label_indptr"], code // 2, attributes, sign)
    sets = feasible_rows(given["feasible_indptr"], given["feasible_index"], given["object_id"])
    feasible = dense_rows(*sets, attributes, None)
    if mode == "draw":
        weight = given["inverse_weight"]
        if "weight_indptr" in given:
            weight = dense_rows(*sets, attributes, weight)
        ignored = sample_ignore_set(
            inverse_weight=weight,
            drawable=feasible & (label == 0) if loss.draw_over == "unannotated" else feasible,
            num_ignore=loss.num_ignore,
            uid=given["uid"],
            visit=given["visit"],
            seed=int(given["seed"][0]),
        )
    elif mode == "list":
        drawn = given["drawn"].to(torch.int64)
        wide = feasible.new_zeros(rows, attributes + 1)  # a place for -1
        ignored = wide.scatter_(1, torch.where(drawn < 0, attributes, drawn), True)[:, :-1]
    elif mode == "mask":
        ignored = given["ignored"]
    else:
        ignored = torch.full_like(feasible, mode == "ignore")
    term = assign_terms(label, feasible, ignored)
    terms = selective_loss(logits.detach(), term, loss=loss, row_weight=row_weight)
    slope = selective_slopes(logits, term, loss=loss)
    if row_weight is not None:
        by_row = row_weight.to(slope.dtype)[:, None]
        slope = torch.where(by_row == 0, 0.0, slope * by_row)
    return terms.per_row, slope.to(logits.dtype), terms.sums.to(torch.float64), terms.counts
