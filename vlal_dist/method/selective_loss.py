"""Eq. (1) and Eq. (3): the selective loss as one table of terms, and its readable reference.

Every (instance, attribute) pair falls into exactly one term; Eq. (1), Eq. (3) and Eq. (4) are this
table (p = sigmoid(logit); the paper prints the first two without the minus sign, we minimise):

    term         pairs                                       loss
    POSITIVE     annotated present                           -(1-p)^gamma_positive   log p
    NEGATIVE     annotated absent                            -p^gamma_negative       log(1-p)
    FEASIBLE     unannotated, in Omega_o, not drawn          -p^gamma_feasible       log(1-p)
    INFEASIBLE   unannotated, not in Omega_o, not drawn      -p^gamma_infeasible     log(1-p)
    IGNORED      unannotated and drawn (omega_a = 0)         0

A margin m (the authors' code: 0.05) replaces p by max(p - m, 0) in all terms but POSITIVE; then
the loss and its gradient are 0 where p <= m. Nothing is clamped: by softplus all forms, and
autograd's gradients of them, are right at any logit.

The fused operator (`kernels/`) computes the same table; its formulas are in `kernels/src/focal.h`.

Shapes: B batch, A attributes. Neither draws (ignore_set.py) nor reduces over the batch.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlal_dist.config.sections import LossConfig


class Term(IntEnum):
    """What a pair counts as; the first four index `LossConfig.gammas`."""

    POSITIVE = 0
    NEGATIVE = 1
    FEASIBLE = 2
    INFEASIBLE = 3
    IGNORED = 4


class LossTerms(NamedTuple):
    """The loss, and what it is made of.

    Attributes:
        per_row: [B], sum over attributes, times the row's weight; differentiable.
        sums: [5], the same by term, over all rows; detached.
        counts: int64 [5], pairs of each term in rows whose weight is not 0.
    """

    per_row: Tensor
    sums: Tensor
    counts: Tensor


def check_pairs(**given: Tensor) -> None:
    """Check that tensors are [B, A] of one shape on one device: nothing broadcasts.

    Raises:
        TypeError: no tensor.
        ValueError: shapes or devices differ, or tensors hold no values.
    """
    shape = None
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__}; give a tensor")
        shape = tensor.shape if shape is None else shape
        device = next(iter(given.values())).device
        strided = tensor.layout == torch.strided and not tensor.is_meta
        if tensor.dim() != 2 or tensor.shape != shape or tensor.device != device or not strided:
            raise ValueError(
                f"{name}: {list(tensor.shape)} on {tensor.device}; give [B, A] of one shape on one "
                f"device, here {list(shape)} on {device}, not sparse"
            )


def assign_terms(label: Tensor, feasible: Tensor, ignored: Tensor) -> Tensor:
    """The term of each pair, Eq. (3) and Eq. (4); annotations override everything else.

    Args:
        label: int8 [B, A]; +1 present, -1 absent, 0 unannotated.
        feasible: bool [B, A], membership in Omega_o.
        ignored: bool [B, A], Omega_Ignore.

    Returns:
        uint8 [B, A] of `Term`.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    check_pairs(label=label, feasible=feasible, ignored=ignored)
    if label.dtype != torch.int8 or feasible.dtype != torch.bool or ignored.dtype != torch.bool:
        raise ValueError(
            f"label {label.dtype}, feasible {feasible.dtype}, ignored {ignored.dtype}; give int8 "
            "and twice bool"
        )
    term = torch.where(feasible, int(Term.FEASIBLE), int(Term.INFEASIBLE))
    term = torch.where(ignored, int(Term.IGNORED), term)
    term = torch.where(label < 0, int(Term.NEGATIVE), term)
    return torch.where(label > 0, int(Term.POSITIVE), term).to(torch.uint8)


def selective_loss(
    logits: Tensor, term: Tensor, *, loss: LossConfig, row_weight: Tensor | None = None
) -> LossTerms:
    """Loss of each row by the table above: Eq. (1), Eq. (3) and Eq. (4).

    16-bit logits are computed in float32, float64 stays. Ignored pairs and rows of weight 0 are
    left out by branch: their loss and gradient are exactly 0 whatever the logit, NaN included.

    Args:
        logits: floating [B, A].
        term: uint8 [B, A] (`assign_terms`).
        loss: its `gammas`, `margin` and `detach_focal` (no gradient through the focusing weight,
            as in the authors' code) are used.
        row_weight: floating [B] or None for 1; no gradient flows to it.

    Returns:
        Losses, sums and counts; float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes or types that do not fit, or a term that is none.
    """
    _check_terms(logits, term)
    if row_weight is not None and row_weight.shape != logits.shape[:1]:
        raise ValueError(f"row_weight: {list(row_weight.shape)}; give [{len(logits)}]")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    dropped = term == int(Term.IGNORED)
    if row_weight is not None:
        dropped = dropped | (row_weight == 0)[:, None]
    z = torch.where(dropped, 0.0, logits.to(dtype))
    gamma = _gamma(term, loss, z)
    positive = term == int(Term.POSITIVE)
    if loss.margin > 0:
        # Each form sees only its own pairs: the other's are 0, where both are regular.
        plain = _focal(torch.where(positive, -z, 0.0), gamma, loss)
        clipped = _focal_margin(torch.where(positive, 0.0, z), gamma, loss)
        pairs = torch.where(positive, plain, clipped)
    else:
        pairs = _focal(torch.where(positive, -z, z), gamma, loss)
    pairs = torch.where(dropped, 0.0, pairs)
    if row_weight is not None:
        pairs = pairs * row_weight.detach().to(dtype)[:, None]
        term = torch.where((row_weight == 0)[:, None], len(Term), term)  # counted nowhere
    per_term = [term == kind for kind in range(len(Term))]
    sums = torch.stack([torch.where(mask, pairs.detach(), 0.0).sum() for mask in per_term])
    return LossTerms(pairs.sum(dim=1), sums, torch.stack([mask.sum() for mask in per_term]))


def selective_slopes(logits: Tensor, term: Tensor, *, loss: LossConfig) -> Tensor:
    """d loss / d logit of each pair in closed form, for use where autograd does not record.

    With u = -z of POSITIVE and z else, P = sigmoid(u), Q = 1 - P, s = softplus(u):
    P^g (g Q s + P); with a margin and p_m = P - m, q_m = Q + m, l = -log(q_m):
    p_m^g (g P Q l / p_m + P Q / q_m), 0 where P <= m. Detached: the second summands alone.

    Args:
        logits, term, loss: as `selective_loss` takes them.

    Returns:
        float32 [B, A], float64 of float64 logits; 0 of ignored pairs.

    Raises:
        ValueError: shapes or types that do not fit, or a term that is none.
    """
    _check_terms(logits, term)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ignored, positive = term == int(Term.IGNORED), term == int(Term.POSITIVE)
    z = torch.where(ignored, 0.0, logits.to(dtype))
    gamma = _gamma(term, loss, z)
    u = torch.where(positive, -z, z)
    p, q, entropy = F.logsigmoid(u).exp(), F.logsigmoid(-u).exp(), -F.logsigmoid(-u)
    base = torch.where(gamma == 0, 0.0, gamma * F.logsigmoid(u)).exp()
    slope = base * p if loss.detach_focal else base * (gamma * q * entropy + p)
    if loss.margin > 0:
        active = ~(p - loss.margin <= 0)
        p_m = torch.where(active, p - loss.margin, 0.5)
        q_m = q + loss.margin
        entropy = torch.where(p_m < 0.5, -torch.log1p(-p_m.clamp(max=0.5)), -torch.log(q_m))
        base = torch.where(gamma == 0, 0.0, gamma * torch.log(p_m)).exp()
        pull = p * q / q_m
        clipped = base * (pull if loss.detach_focal else gamma * p * q * entropy / p_m + pull)
        slope = torch.where(positive, slope, torch.where(active, clipped, 0.0))
    return torch.where(ignored, 0.0, torch.where(positive, -slope, slope))


def _check_terms(logits: Tensor, term: Tensor) -> None:
    """Check logits and terms; values of the terms where they can be seen without waiting."""
    check_pairs(logits=logits, term=term)
    if not logits.is_floating_point() or term.dtype != torch.uint8:
        raise ValueError(f"logits {logits.dtype}, term {term.dtype}; give floating and uint8")
    seen = term.is_cpu and not torch.compiler.is_compiling() and term.numel() > 0
    if seen and int(term.max()) >= len(Term):
        raise ValueError(f"term: {int(term.max())} is none; give those of assign_terms")


def _gamma(term: Tensor, loss: LossConfig, like: Tensor) -> Tensor:
    """Each pair's exponent; 0 of ignored pairs."""
    return like.new_tensor([*loss.gammas, 0.0])[term.to(torch.int64)]


def _focal(u: Tensor, gamma: Tensor, loss: LossConfig) -> Tensor:
    """P^gamma * softplus(u) with P = sigmoid(u): all four terms, u = -logit for POSITIVE."""
    return _power(F.logsigmoid(u), gamma, loss) * -F.logsigmoid(-u)


def _focal_margin(z: Tensor, gamma: Tensor, loss: LossConfig) -> Tensor:
    """p_m^gamma * -log(1 - p_m) with p_m = max(p - m, 0).

    `where` stands before every function that is singular on the side not taken: a zero gradient
    times an infinite slope is NaN. A NaN logit counts as active and stays NaN.
    """
    # exp(logsigmoid), not sigmoid: autograd's slope p (1 - p) loses 1 - p at large logits.
    p, q = F.logsigmoid(z).exp(), F.logsigmoid(-z).exp()
    active = ~(p - loss.margin <= 0)
    p_m = torch.where(active, p - loss.margin, 0.5)
    small = p_m < 0.5
    cross_entropy = torch.where(
        small, -torch.log1p(-torch.where(small, p_m, 0.0)), -torch.log(q + loss.margin)
    )
    return torch.where(active, _power(torch.log(p_m), gamma, loss) * cross_entropy, 0.0)


def _power(log_base: Tensor, gamma: Tensor, loss: LossConfig) -> Tensor:
    """base^gamma; gamma 0 gives 1 also for base 0, whose logarithm times 0 is NaN."""
    exponent = torch.where(gamma == 0, 0.0, gamma * log_base)
    return exponent.detach().exp() if loss.detach_focal else exponent.exp()
