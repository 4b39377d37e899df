"""Table 1: the baselines as settings of the selective loss, and PSL's choice of what to ignore.

Every row differs from the paper's method only in the exponents and in what happens to the
unannotated pairs; the probability margin (0.05 in the authors' code) is the caller's, for all
rows, CE included. Gammas are POSITIVE, NEGATIVE, FEASIBLE, INFEASIBLE:

    loss              gammas        unannotated
    selective         1, 2, 4, 7    select: ignore set drawn by likelihood (Fig. 3)
    ce_ignoring       0, 0, 0, 0    ignore: all IGNORED
    ce_negatifying    0, 0, 0, 0    negatify: none IGNORED
    asl_ignoring      1, 2, 4, 4    ignore
    asl_negatifying   1, 2, 4, 4    negatify; unlike textbook ASL, 4 for the unannotated
    psl               1, 2, 4, 4    psl: the most probable ones IGNORED (`psl_ignored`)

Shapes: B, N rows, A attributes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlal_dist.errors import ConfigError

Unannotated = Literal["select", "ignore", "negatify", "psl"]

_ASL = (1.0, 2.0, 4.0, 4.0)
_CE = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class LossSettings:
    """A row of Table 1.

    Attributes:
        gammas: focusing exponents of POSITIVE, NEGATIVE, FEASIBLE, INFEASIBLE.
        unannotated: treatment of unannotated pairs (the table above).
    """

    gammas: tuple[float, float, float, float]
    unannotated: Unannotated


def loss_settings(
    name: str,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 2.0,
    gamma_feasible: float = 4.0,
    gamma_infeasible: float = 7.0,
) -> LossSettings:
    """The settings of a row of Table 1; the gammas given are those of `selective` alone.

    Args:
        name: a loss of the table above.
        gamma_positive: focusing of annotated present pairs (Sec. 3.2).
        gamma_negative: of annotated absent pairs.
        gamma_feasible: of unannotated feasible pairs.
        gamma_infeasible: of unannotated infeasible pairs.

    Raises:
        ConfigError: no such row.
    """
    rows = {
        "selective": LossSettings(
            (gamma_positive, gamma_negative, gamma_feasible, gamma_infeasible), "select"
        ),
        "ce_ignoring": LossSettings(_CE, "ignore"),
        "ce_negatifying": LossSettings(_CE, "negatify"),
        "asl_ignoring": LossSettings(_ASL, "ignore"),
        "asl_negatifying": LossSettings(_ASL, "negatify"),
        "psl": LossSettings(_ASL, "psl"),
    }
    if name not in rows:
        raise ConfigError(f"loss {name!r} is not a row of Table 1; give one of {', '.join(rows)}")
    return rows[name]


def check_settings(gammas: tuple[float, ...], margin: float) -> None:
    """Refuse what the formulas do not allow.

    Raises:
        ConfigError: a gamma is negative, or the margin is outside of [0, 1).
    """
    if len(gammas) != 4 or not all(g >= 0 for g in gammas) or not 0 <= margin < 1:
        raise ConfigError(f"gammas {gammas}, margin {margin}: give 4 gammas >= 0, 0 <= margin < 1")


def fixed_ignored(unannotated: Tensor, *, treatment: Literal["ignore", "negatify"]) -> Tensor:
    """The ignored pairs of the treatments that need neither draw nor probabilities.

    Args:
        unannotated: bool [B, A].
        treatment: `ignore` takes all unannotated pairs, `negatify` none.

    Returns:
        bool [B, A], for `assign_terms`.
    """
    return unannotated.clone() if treatment == "ignore" else torch.zeros_like(unannotated)


def psl_ignored(
    *,
    probability: Tensor,
    unannotated: Tensor,
    prior: Tensor,
    threshold: float,
    top_k: int,
    margin: float,
) -> Tensor:
    """Pairs that partially selective learning (PSL) ignores.

    Unannotated pairs of attributes with a prior above the threshold, and the top_k * N
    unannotated pairs of highest probability over the whole batch; pairs that the prior already
    ignores use places of that quota. Probabilities at or below the margin tie, as in the
    authors' code, and ties go to the earlier row, then the lower attribute: rows gathered in
    global order give the same choice for any sharding.

    Args:
        probability: floating [N, A], of all rows of the global batch (no gradient).
        unannotated: bool [N, A].
        prior: floating [A], mean probability of each attribute over training.
        threshold: prior above which an attribute is ignored (0.5).
        top_k: pairs per row on average (5), >= 0.
        margin: the loss's probability margin.

    Returns:
        bool [N, A].

    Raises:
        ConfigError: top_k is negative.
    """
    if top_k < 0:
        raise ConfigError(f"psl_topk is {top_k}; give 0 or more")
    by_prior = unannotated & (prior > threshold)
    ranked = probability.detach().clamp(min=margin).masked_fill(~unannotated, -1.0).flatten()
    order = ranked.sort(descending=True, stable=True).indices[: top_k * len(probability)]
    chosen = torch.zeros_like(unannotated).flatten()
    chosen[order] = True
    return by_prior | (chosen.view_as(unannotated) & unannotated)
