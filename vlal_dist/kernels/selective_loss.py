"""The selective loss with its draw as one operator: Eqs. (1), (3), (4) and Fig. 3 in one pass.

The same numbers as `method/` gives, which is its oracle: the draw bit for bit, losses and gradients
within float32. `method/selective_loss.py` has the table of terms.

Legend: B rows, A attributes.
"""

from typing import Literal

import torch
from torch import Tensor

from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cpu, cuda, reference
from vlal_dist.kernels.arguments import (
    NAMES,
    Draw,
    FeasibleTable,
    Labels,
    Tensors,
    check,
    check_logits,
)
from vlal_dist.kernels.backend import choose
from vlal_dist.kernels.operator import EagerLoss, compiled_loss
from vlal_dist.method.baselines import check_settings
from vlal_dist.method.selective_loss import LossTerms

Treatment = Literal["ignore", "negatify"]
Kernel = Literal["auto", "reference"]


def selective_loss(
    logits: Tensor,
    *,
    label: Tensor | Labels,
    object_id: Tensor,
    feasible: FeasibleTable,
    ignored: Draw | Tensor | Treatment,
    gammas: tuple[float, float, float, float],
    margin: float = 0.0,
    detach_focal: bool = False,
    row_weight: Tensor | None = None,
    kernel: Kernel = "auto",
    in_place: bool = False,
) -> LossTerms:
    """Losses of all rows; their gradient is made in the same pass.

    Args:
        logits: float32, bfloat16 or float16 [B, A], or float64; rows may lie apart.
        label: int8 [B, A] (+1 present, -1 absent, 0 unannotated), or CSR.
        object_id: int64 [B].
        feasible: Omega_o of all objects.
        ignored: the draw of Fig. 3; or the attributes drawn before (`draw_ignored`), int32 [B, k],
            -1 where there are fewer; or a mask, bool [B, A]; or what Table 1's baselines do with
            all unannotated pairs.
        gammas: focusing exponents >= 0 of POSITIVE, NEGATIVE, FEASIBLE, INFEASIBLE.
        margin: m in [0, 1).
        detach_focal: no gradient through the focusing weight.
        row_weight: float32 [B], or None for 1; a row of weight 0 has no loss, whatever its logits.
        kernel: `reference` takes the readable one, `auto` the fastest (`backend.choose`).
        in_place: the gradient takes the logits' memory; torch refuses a backward pass that needs
            them. Under torch.compile it does nothing.

    Returns:
        Losses [B] (float32, float64 of float64 logits), sums and counts of the terms.

    Raises:
        ConfigError: a gamma is negative, the margin is outside of [0, 1), or num_ignore below -1.
        ValueError: tensors whose shapes or types do not fit; in place of a leaf.
    """
    check_settings(gammas, margin)
    check_logits(logits)
    tensors: Tensors = {
        "logits": logits,
        **_labels(label),
        "object_id": object_id,
        "feasible_indptr": feasible.indptr,
        "feasible_index": feasible.indices,
        "row_weight": row_weight,
    }
    drawing = _add_ignored(tensors, ignored)
    rows, attributes = logits.shape
    check(tensors, rows=rows, attributes=attributes, device=logits.device)
    settings = (*drawing, list(gammas), margin, detach_focal, feasible.largest, kernel)
    if torch.compiler.is_compiling():
        per_row, _, sums, counts = compiled_loss(*(tensors.get(name) for name in NAMES), *settings)
    else:
        if in_place and logits.requires_grad and logits.is_leaf:
            raise ValueError("in_place: the logits are a leaf, whose values are its owner's")
        per_row, sums, counts = EagerLoss.apply(logits, tensors, settings, in_place)  # type: ignore[no-untyped-call]
    return LossTerms(per_row, sums, counts)


def draw_ignored(
    draw: Draw,
    *,
    label: Tensor | Labels,
    object_id: Tensor,
    feasible: FeasibleTable,
    attributes: int,
    kernel: Kernel = "auto",
) -> Tensor:
    """The attributes that `selective_loss` would draw, before there are logits.

    Args:
        draw: with num_ignore >= 0.
        label, object_id, feasible, kernel: of `selective_loss`; labels matter where the draw is
            over unannotated attributes alone.
        attributes: A.

    Returns:
        int32 [B, min(num_ignore, A)], ascending within a row, -1 where there are fewer.

    Raises:
        ConfigError: num_ignore is negative.
        ValueError: tensors whose shapes or types do not fit.
    """
    if draw.num_ignore < 0:
        raise ConfigError(f"num_ignore is {draw.num_ignore}; a list needs 0 or more")
    tensors: Tensors = {
        **_labels(label),
        "object_id": object_id,
        "feasible_indptr": feasible.indptr,
        "feasible_index": feasible.indices,
    }
    _add_ignored(tensors, draw)
    check(tensors, rows=len(object_id), attributes=attributes, device=object_id.device)
    laid = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    backend = choose(object_id.device.type).name if kernel == "auto" else kernel
    given = (attributes, draw.num_ignore, draw.over_unannotated)
    if backend == "cuda":
        return cuda.draw(laid, *given, largest=feasible.largest)
    if backend == "cpu":
        return cpu.draw(laid, *given)
    return reference.draw(laid, *given)


def _labels(label: Tensor | Labels) -> Tensors:
    if isinstance(label, Labels):
        return {"label_indptr": label.indptr, "label_code": label.code}
    return {"label": label}


def _add_ignored(tensors: Tensors, ignored: Draw | Tensor | Treatment) -> tuple[str, int, bool]:
    """Add what says which pairs are ignored; mode, num_ignore and over_unannotated."""
    if isinstance(ignored, Draw):
        if ignored.num_ignore < -1:
            raise ConfigError(f"num_ignore is {ignored.num_ignore}; give 0 or more, or -1 for all")
        names = ("weight_indptr", "inverse_weight", "uid", "visit", "seed")
        tensors |= {name: getattr(ignored, name) for name in names}
        return "draw", ignored.num_ignore, ignored.over_unannotated
    if isinstance(ignored, str):
        if ignored not in ("ignore", "negatify"):
            raise ConfigError(f"ignored is {ignored!r}; give ignore, negatify, or tensors")
        return ignored, 0, False
    mode, name = ("mask", "ignored") if ignored.dtype == torch.bool else ("list", "drawn")
    tensors[name] = ignored
    return mode, 0, False
