"""The operator by the readable functions of `method/`: any device, and the oracle of the others."""

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from vlal_dist.kernels.arguments import Asked, Outputs, Tensors
from vlal_dist.method.baselines import fixed_ignored
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.method.selective_loss import Term, assign_terms, selective_loss


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


def run(tensors: Tensors, **asked: Unpack[Asked]) -> Outputs:
    """As `cpu.run`."""
    mode, logits = asked["mode"], tensors["logits"]
    assert logits is not None
    rows, attributes = logits.shape
    label, feasible = _label_and_feasible(tensors, attributes)
    ignored = torch.zeros_like(feasible)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if mode == "draw":
        how_many = (asked["num_ignore"], asked["over_unannotated"])
        ignored = _drawn(tensors, label, feasible, *how_many)
    elif mode == "list":
        drawn = given["drawn"].to(torch.int64)
        wide = ignored.new_zeros(rows, attributes + 1)  # a place for -1
        ignored = wide.scatter_(1, torch.where(drawn < 0, attributes, drawn), True)[:, :-1]
    elif mode == "mask":
        ignored = given["ignored"]
    elif mode == "ignore":
        ignored = fixed_ignored(label == 0, treatment="ignore")
    term = assign_terms(label, feasible, ignored)
    row_weight = given.get("row_weight")
    shape: Any = {name: asked[name] for name in ("gammas", "margin", "detach_focal")}
    loss = selective_loss(
        logits.detach(),
        term,
        row_weight=row_weight,
        **shape,
    )
    slope = slopes(logits, term, **shape)
    if row_weight is not None:
        by_row = row_weight.to(slope.dtype)[:, None]
        slope = torch.where(by_row == 0, 0.0, slope * by_row)
    gradient = slope.to(logits.dtype)
    if "gradient" in given:
        gradient = given["gradient"].detach().copy_(gradient)
    return loss.per_row, gradient, loss.sums.to(torch.float64), loss.counts


def draw(tensors: Tensors, attributes: int, num_ignore: int, over_unannotated: bool) -> Tensor:
    """As `cpu.draw`."""
    label, feasible = _label_and_feasible(tensors, attributes)
    ignored = _drawn(tensors, label, feasible, num_ignore, over_unannotated)
    places = torch.where(ignored, torch.arange(attributes, device=ignored.device), attributes)
    first = places.sort(dim=1).values[:, :num_ignore]
    return torch.where(first == attributes, -1, first).to(torch.int32)


def _label_and_feasible(tensors: Tensors, attributes: int) -> tuple[Tensor, Tensor]:
    """Labels int8 and Omega_o bool, both [B, A]."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    label = given.get("label")
    if label is None:
        code = given["label_code"]
        sign = (code % 2 * 2 - 1).to(torch.int8)
        label = dense_rows(given["label_indptr"], code // 2, attributes, sign)
    feasible = feasible_rows(given["feasible_indptr"], given["feasible_index"], given["object_id"])
    return label, dense_rows(*feasible, attributes, None)


def _drawn(
    tensors: Tensors, label: Tensor, feasible: Tensor, num_ignore: int, over_unannotated: bool
) -> Tensor:
    """Omega_Ignore, bool [B, A]."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    weight = torch.zeros(feasible.shape, device=feasible.device)
    weight[feasible] = given["inverse_weight"]  # both go by row, then by attribute
    return sample_ignore_set(
        inverse_weight=weight,
        drawable=feasible & (label == 0) if over_unannotated else feasible,
        num_ignore=None if num_ignore < 0 else num_ignore,
        uid=given["uid"],
        visit=given["visit"],
        seed=int(given["seed"][0]),
    )


def slopes(
    logits: Tensor,
    term: Tensor,
    *,
    gammas: tuple[float, float, float, float],
    margin: float,
    detach_focal: bool,
) -> Tensor:
    """d loss / d logit of each pair, in closed form: autograd is not at hand within an operator.

    With u = -z of POSITIVE and z else, P = sigmoid(u), Q = 1 - P, s = softplus(u):
    P^g (g Q s + P); with a margin and p_m = P - m, q_m = Q + m, l = -log(q_m):
    p_m^g (g P Q l / p_m + P Q / q_m), 0 where P <= m. Detached: the second summands alone.

    Returns:
        float32 [B, A], float64 of float64 logits; 0 of ignored pairs.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ignored, positive = term == int(Term.IGNORED), term == int(Term.POSITIVE)
    z = torch.where(ignored, 0.0, logits.to(dtype))
    gamma = torch.tensor([*gammas, 0.0], dtype=dtype, device=z.device)[term.to(torch.int64)]
    u = torch.where(positive, -z, z)
    p, q, entropy = F.logsigmoid(u).exp(), F.logsigmoid(-u).exp(), -F.logsigmoid(-u)
    base = torch.where(gamma == 0, 0.0, gamma * F.logsigmoid(u)).exp()
    slope = base * p if detach_focal else base * (gamma * q * entropy + p)
    if margin > 0:
        active = ~(p - margin <= 0)
        p_m = torch.where(active, p - margin, 0.5)
        q_m = q + margin
        entropy = torch.where(p_m < 0.5, -torch.log1p(-p_m.clamp(max=0.5)), -torch.log(q_m))
        base = torch.where(gamma == 0, 0.0, gamma * torch.log(p_m)).exp()
        pull = p * q / q_m
        clipped = base * (pull if detach_focal else gamma * p * q * entropy / p_m + pull)
        slope = torch.where(positive, slope, torch.where(active, clipped, 0.0))
    return torch.where(ignored, 0.0, torch.where(positive, -slope, slope))
