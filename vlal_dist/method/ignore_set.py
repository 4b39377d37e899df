"""Fig. 3 and Eq. (4): draw Omega_Ignore from the likelihoods, without replacement.

Fig. 3 draws NUM_IGNORE attributes one after another with probabilities G. That is a race of
exponential clocks: attribute a finishes at E_a / g_a, and the first k to finish are the sample.
With inverse weights max(g) / g_a the race needs no normalisation and no division.

Shapes: B batch, N rows of the global batch, A attributes. No generator's state is touched.
"""

from typing import Literal

import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.method.philox import philox4x32, unit_exponential
from vlal_dist.method.selective_loss import check_pairs

NumIgnore = int | Literal["all"]
"""NUM_IGNORE >= 0, or the whole drawing set, members that cannot be drawn included."""

_WORD = 0xFFFFFFFF
# Orders after every key of an attribute that can be drawn, infinite ones included.
_NOT_DRAWN = 0x7FFFFFFF


def draw_keys(*, uid: Tensor, visit: Tensor, seed: int, num_attributes: int) -> Tensor:
    """The clocks E of the race: Philox words of (seed, visit, uid, attribute), rate 1.

    Word `attribute & 3` of the block with counter (attribute >> 2, visit, uid's low 32 bits,
    uid's high 32 bits) and key (seed's low 32 bits, seed's high 32 bits).

    Args:
        uid: int64 [B], the bits of the samples' unsigned names.
        visit: int64 [B], running count of each sample's visits; its low 32 bits count.
        seed: any integer; its low 64 bits count (two's complement).
        num_attributes: A.

    Returns:
        float32 [B, A], positive and finite.
    """
    group = torch.arange((num_attributes + 3) // 4, device=uid.device)
    counter = (
        group[None, :],
        (visit & _WORD)[:, None],
        (uid & _WORD)[:, None],
        ((uid >> 32) & _WORD)[:, None],
    )
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    word = torch.stack(words, dim=2).reshape(len(uid), 4 * len(group))[:, :num_attributes]
    return unit_exponential(word)


def sample_ignore_set(
    *,
    inverse_weight: Tensor,
    drawable: Tensor,
    num_ignore: NumIgnore,
    uid: Tensor,
    visit: Tensor,
    seed: int,
) -> Tensor:
    """Omega_Ignore of each sample (Fig. 3); Eq. (4) is `~ignored`.

    The k = min(num_ignore, members of the drawing set that can be drawn) smallest race keys
    E * inverse_weight; ties go to the lower attribute id. An annotated attribute that is drawn
    uses a place and has no effect: `assign_terms` decides that.

    Args:
        inverse_weight: float32 [B, A], max likelihood / likelihood (`inverse_weights`); an
            attribute whose value is not positive and finite cannot be drawn.
        drawable: bool [B, A], the drawing set, such as Omega_o.
        num_ignore: attributes drawn per row.
        uid: int64 [B].
        visit: int64 [B].
        seed: of the run.

    Returns:
        bool [B, A].

    Raises:
        ConfigError: num_ignore is negative.
        ValueError: shapes or types that do not fit.
    """
    _check_weights(inverse_weight, drawable)
    for name, one in (("uid", uid), ("visit", visit)):
        if (
            not isinstance(one, Tensor)
            or one.dtype != torch.int64
            or one.shape != drawable.shape[:1]
        ):
            raise ValueError(f"{name}: give int64 [{len(drawable)}]")
    if num_ignore == "all":
        return drawable.clone()
    weight = inverse_weight.to(torch.float32)
    clock = draw_keys(uid=uid, visit=visit, seed=seed, num_attributes=weight.shape[1])
    return _smallest(clock * weight, drawable & (weight > 0) & weight.isfinite(), num_ignore)


def top_ignore_set(*, inverse_weight: Tensor, drawable: Tensor, num_ignore: NumIgnore) -> Tensor:
    """The most likely attributes instead of a draw: an ablation of Fig. 3, without randomness.

    The k smallest inverse weights, k as in `sample_ignore_set`; ties go to the lower attribute id.

    Args:
        inverse_weight, drawable, num_ignore: as `sample_ignore_set` takes them.

    Returns:
        bool [B, A], the same at every visit.

    Raises:
        ConfigError: num_ignore is negative.
        ValueError: shapes or types that do not fit.
    """
    _check_weights(inverse_weight, drawable)
    if num_ignore == "all":
        return drawable.clone()
    weight = inverse_weight.to(torch.float32)
    return _smallest(weight, drawable & (weight > 0) & weight.isfinite(), num_ignore)


def _check_weights(inverse_weight: Tensor, drawable: Tensor) -> None:
    """Check shapes and types of weights and drawing sets."""
    check_pairs(inverse_weight=inverse_weight, drawable=drawable)
    if not inverse_weight.is_floating_point() or drawable.dtype != torch.bool:
        kinds = f"inverse_weight {inverse_weight.dtype}, drawable {drawable.dtype}"
        raise ValueError(f"{kinds}; give floating and bool")


def _smallest(key: Tensor, candidate: Tensor, count: int) -> Tensor:
    """The candidates with the smallest keys, float32 and positive; bool [B, A]."""
    if count < 0:
        raise ConfigError(f"num_ignore is {count}; give 0 or more, or all")
    if count == 0 or key.numel() == 0:
        return torch.zeros_like(candidate)
    num_attributes = key.shape[1]
    # Positive floats order as their bits do; the id below them makes every code distinct.
    bits = torch.where(candidate, key.view(torch.int32), _NOT_DRAWN).to(torch.int64)
    code = (bits << 32) | torch.arange(num_attributes, device=bits.device)
    smallest = code.topk(min(count, num_attributes), dim=1, largest=False).values
    drawn = (smallest >> 32) != _NOT_DRAWN
    return torch.zeros_like(candidate).scatter_(1, smallest & _WORD, drawn)


def psl_ignored(
    *, probability: Tensor, unannotated: Tensor, prior: Tensor, loss: LossConfig
) -> Tensor:
    """Pairs that partially selective learning (PSL) ignores.

    The other baselines of Table 1 ignore all unannotated pairs or none. PSL ignores
    unannotated pairs of attributes with a prior above `psl_threshold`, and the `psl_topk` * N
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

    Raises:
        ValueError: shapes or types that do not fit.
    """
    check_pairs(probability=probability, unannotated=unannotated)
    if unannotated.dtype != torch.bool or not probability.is_floating_point():
        raise ValueError("give probability floating and unannotated bool")
    if prior.shape != probability.shape[1:] or prior.device != probability.device:
        raise ValueError(f"prior: {list(prior.shape)} on {prior.device}; give floating [A]")
    by_prior = unannotated & (prior > loss.psl_threshold)
    clipped = probability.detach().clamp(min=loss.margin)
    ranked = clipped.masked_fill(~unannotated, -1.0).flatten()
    order = ranked.sort(descending=True, stable=True).indices[: loss.psl_topk * len(probability)]
    chosen = torch.zeros_like(unannotated).flatten()
    chosen[order] = True
    return by_prior | (chosen.view_as(unannotated) & unannotated)
