"""Partially selective learning (PSL), a baseline of Table 1: which unannotated pairs it ignores.

The other baselines ignore all unannotated pairs or none, and differ in their exponents:
`LossConfig.unannotated` and `LossConfig.gammas`. The probability margin (0.05 in the authors' code)
is the same for all rows, CE included.

Shapes: N rows, A attributes.
"""

import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig


def psl_ignored(
    *, probability: Tensor, unannotated: Tensor, prior: Tensor, loss: LossConfig
) -> Tensor:
    """Pairs that partially selective learning (PSL) ignores.

    Unannotated pairs of attributes with a prior above `psl_threshold`, and the `psl_topk` * N
    unannotated pairs of highest probability over the whole batch; pairs that the prior already
    ignores use places of that quota. Probabilities at or below the margin tie, as in the
    authors' code, and ties go to the earlier row, then the lower attribute: rows gathered in
    global order give the same choice for any sharding.

    Args:
        probability: floating [N, A], of all rows of the global batch (no gradient).
        unannotated: bool [N, A].
        prior: floating [A], mean probability of each attribute over training.
        loss: its `psl_threshold`, `psl_topk` and `margin` are used.

    Returns:
        bool [N, A].
    """
    by_prior = unannotated & (prior > loss.psl_threshold)
    clipped = probability.detach().clamp(min=loss.margin)
    ranked = clipped.masked_fill(~unannotated, -1.0).flatten()
    order = ranked.sort(descending=True, stable=True).indices[: loss.psl_topk * len(probability)]
    chosen = torch.zeros_like(unannotated).flatten()
    chosen[order] = True
    return by_prior | (chosen.view_as(unannotated) & unannotated)
