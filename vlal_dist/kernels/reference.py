"""The operator by the readable functions of `method/`: any device, and the oracle of the others."""

import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig
from vlal_dist.kernels.arguments import PROBLEMS, Outputs, Tensors, refuse
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


def check_values(given: dict[str, Tensor], mode: str, loss: LossConfig) -> None:
    """Refuse what the programs refuse; of the feasible table all sets, also those of no row.

    Args:
        given: tensors by their names in the C structure, without those that are absent.
        mode, loss: of `run`.

    Raises:
        ValueError: a row's values are not allowed.
    """
    object_id, attributes = given["object_id"], given["logits"].shape[1]
    starts, index = given["feasible_indptr"], given["feasible_index"]
    if "row_weight" in given:
        weight = given["row_weight"]
        _require("row_weight", (weight >= 0) & weight.isfinite())
    _require("object_id", (object_id >= 0) & (object_id < len(starts) - 1))
    good = _covers(starts, len(index))
    if good:
        rises = index.diff() > 0
        rises[starts[(starts > 0) & (starts < len(index))] - 1] = True
        good = bool((rises.all() & ((index >= 0) & (index < attributes)).all()).item())
    _require("feasible", torch.tensor([good]))
    if "label" in given:
        label = given["label"]
        _require("label", ((label >= -1) & (label <= 1)).all(1))
    else:
        bounds, code = given["label_indptr"], given["label_code"]
        good = _covers(bounds, len(code)) and bool(((code >= 0) & (code >> 1 < attributes)).all())
        if good:
            row = torch.repeat_interleave(bounds.diff())
            good = len(torch.unique(row * attributes + (code >> 1))) == len(code)
        _require("label", torch.tensor([good]))
    if mode == "list":
        drawn = given["drawn"]
        _require("drawn", ((drawn >= -1) & (drawn < attributes)).all(1))
    if mode == "draw" and loss.num_ignore not in (0, "all"):
        lengths, inverse = starts.diff()[object_id], given["inverse_weight"]
        if "weight_indptr" in given:
            rows = given["weight_indptr"]
            fits = _covers(rows, len(inverse)) and torch.equal(rows.diff(), lengths)
            _require("weight_indptr", torch.tensor([fits]))
            _require("inverse_weight", (inverse >= 1).all()[None])
        else:
            sets = dense_rows(*feasible_rows(starts, index, object_id), attributes, None)
            _require("inverse_weight", ((inverse >= 1) | ~sets).all(1))


def _covers(indptr: Tensor, size: int) -> bool:
    """Whether offsets rise from 0 to `size`."""
    ends = int(indptr[0]) == 0 and int(indptr[-1]) == size
    return ends and bool((indptr.diff() >= 0).all())


def _require(name: str, holds: Tensor) -> None:
    """Raise for the first row, or for the batch where it is one value, that is not right."""
    if not bool(holds.all()):
        problem = next(n for n, text in enumerate(PROBLEMS, 1) if text.startswith(f"{name}:"))
        refuse(int((~holds).nonzero()[0, 0]), problem)


def run(tensors: Tensors, mode: str, loss: LossConfig) -> Outputs:
    """As `cpu.run`."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_values(given, mode, loss)
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
