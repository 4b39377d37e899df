"""The selective loss with its draw as one operator: Eqs. (1), (3), (4) and Fig. 3 in one pass.

The same numbers as `method/` gives, which is its oracle: the draw bit for bit, losses and gradients
within float32. `method/selective_loss.py` has the table of terms.

Legend: B rows, A attributes.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cpu, reference
from vlal_dist.kernels.arguments import KINDS
from vlal_dist.kernels.backend import choose
from vlal_dist.kernels.inputs import Draw, FeasibleTable, Labels
from vlal_dist.method.selective_loss import LossTerms

Treatment = Literal["ignore", "negatify"]
Kernel = Literal["auto", "reference"]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


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
) -> LossTerms:
    """Losses of all rows; their gradient is made in the same pass.

    Args:
        logits: float32, bfloat16 or float16 [B, A], float64 on the CPU; rows may lie apart.
        label: int8 [B, A] (+1 present, -1 absent, 0 unannotated), or CSR.
        object_id: int64 [B].
        feasible: Omega_o of all objects.
        ignored: the draw of Fig. 3; or the attributes drawn before, int32 [B, k], -1 where there
            are fewer; or a mask, bool [B, A]; or what Table 1's baselines do with all unannotated
            pairs.
        gammas: focusing exponents >= 0 of POSITIVE, NEGATIVE, FEASIBLE, INFEASIBLE.
        margin: m in [0, 1).
        detach_focal: no gradient through the focusing weight.
        row_weight: float32 [B], or None for 1; a row of weight 0 has no loss, whatever its logits.
        kernel: `reference` takes the readable one, `auto` the fastest (`backend.choose`).

    Returns:
        Losses [B] (float32, float64 of float64 logits), sums and counts of the terms.

    Raises:
        ConfigError: a gamma is negative, the margin is outside of [0, 1), or num_ignore below -1.
        ValueError: tensors whose shapes or types do not fit.
    """
    check_settings(gammas, margin)
    tensors: dict[str, Tensor | None] = {
        "logits": logits,
        "object_id": object_id,
        "feasible_indptr": feasible.indptr,
        "feasible_index": feasible.indices,
        "row_weight": row_weight,
    }
    if isinstance(label, Labels):
        tensors |= {"label_indptr": label.indptr, "label_code": label.code}
    else:
        tensors["label"] = label
    drawing = _add_ignored(tensors, ignored)
    check(tensors)
    settings = (*drawing, list(gammas), margin, detach_focal, kernel)
    if torch.compiler.is_compiling():
        per_row, _, sums, counts = _operator(*(tensors.get(name) for name in _NAMES), *settings)
    else:
        per_row, sums, counts = _Eager.apply(logits, tensors, settings)  # type: ignore[no-untyped-call]
    return LossTerms(per_row, sums, counts)


def check_settings(gammas: tuple[float, ...], margin: float) -> None:
    """Refuse what the formulas do not allow.

    Raises:
        ConfigError: a gamma is negative, or the margin is outside of [0, 1).
    """
    if len(gammas) != 4 or not all(g >= 0 for g in gammas) or not 0 <= margin < 1:
        raise ConfigError(f"gammas {gammas}, margin {margin}: give 4 gammas >= 0, 0 <= margin < 1")


def _add_ignored(
    tensors: dict[str, Tensor | None], ignored: Draw | Tensor | Treatment
) -> tuple[str, int, bool]:
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


_TYPES = {
    "label": torch.int8,
    "label_indptr": torch.int64,
    "label_code": torch.int32,
    "object_id": torch.int64,
    "feasible_indptr": torch.int64,
    "feasible_index": torch.int32,
    "weight_indptr": torch.int64,
    "inverse_weight": torch.float32,
    "uid": torch.int64,
    "visit": torch.int64,
    "seed": torch.int64,
    "drawn": torch.int32,
    "ignored": torch.bool,
    "row_weight": torch.float32,
}
_NAMES = ("logits", *_TYPES)


def check(tensors: dict[str, Tensor | None]) -> None:
    """Shapes, types and devices; values (ids within their tables) are the caller's.

    Raises:
        ValueError: something does not fit.
    """
    logits = tensors["logits"]
    assert logits is not None
    if logits.dim() != 2 or logits.dtype not in KINDS:
        raise ValueError(f"logits: {logits.dtype} {list(logits.shape)}, floating [B, A] is needed")
    rows, attributes = logits.shape
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("label", "ignored"), (rows, attributes)),
        **dict.fromkeys(("label_indptr", "weight_indptr"), (rows + 1,)),
        **dict.fromkeys(("object_id", "uid", "visit", "row_weight"), (rows,)),
        "seed": (1,),
    }
    for name, dtype in _TYPES.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        wanted = shapes.get(name)
        fits = wanted is None or tensor.shape == wanted
        if name == "drawn":
            fits = tensor.dim() == 2 and len(tensor) == rows
        if tensor.dtype != dtype or not fits or tensor.device != logits.device:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; {dtype} "
                f"{list(wanted) if wanted else ''} on {logits.device} is needed"
            )


def _run(tensors: dict[str, Tensor | None], settings: tuple[Any, ...]) -> Outputs:
    """By the backend of the logits' device."""
    mode, num_ignore, over_unannotated, gammas, margin, detach_focal, kernel = settings
    logits = tensors["logits"]
    assert logits is not None
    laid = {n: None if t is None else t.contiguous() for n, t in tensors.items()}
    if logits.stride(1) == 1:  # rows may lie apart, elements of a row may not
        laid["logits"] = logits
    fused = kernel == "auto" and choose(logits.device.type).name == "cpu"
    backend = cpu.run if fused else reference.run
    return backend(
        laid,
        mode=mode,
        num_ignore=num_ignore,
        over_unannotated=over_unannotated,
        gammas=tuple(gammas),
        margin=margin,
        detach_focal=detach_focal,
    )


class _Eager(torch.autograd.Function):
    """Outside of torch.compile: a third of the registered operator's overhead."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tensors: dict[str, Tensor | None], settings: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, sums, counts; keeps the gradient."""
        per_row, gradient, sums, counts = _run(tensors, settings)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums, counts)
        return per_row, sums, counts

    @staticmethod
    def backward(ctx: Any, grad_per_row: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        """The kept gradient, scaled by row."""
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, grad_per_row), None, None


def _scaled(gradient: Tensor, by_row: Tensor) -> Tensor:
    """The gradient times that of each row's loss.

    Raises:
        RuntimeError: within create_graph: the gradient has no derivative of its own.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the fused selective loss cannot be differentiated twice")
    plain_sum = by_row.device.type == "cpu" and len(by_row) and by_row.stride() == (0,)
    if plain_sum and float(by_row[0]) == 1.0:
        return gradient  # another pass would only multiply by 1
    # In float32 also for 16 bits, which do not hold a loss scale of 65536.
    return (gradient * by_row[:, None]).to(gradient.dtype)


@torch.library.custom_op("vlal::selective_loss", mutates_args=())
def _operator(
    logits: Tensor,
    label: Tensor | None,
    label_indptr: Tensor | None,
    label_code: Tensor | None,
    object_id: Tensor,
    feasible_indptr: Tensor,
    feasible_index: Tensor,
    weight_indptr: Tensor | None,
    inverse_weight: Tensor | None,
    uid: Tensor | None,
    visit: Tensor | None,
    seed: Tensor | None,
    drawn: Tensor | None,
    ignored: Tensor | None,
    row_weight: Tensor | None,
    mode: str,
    num_ignore: int,
    over_unannotated: bool,
    gammas: list[float],
    margin: float,
    detach_focal: bool,
    kernel: str,
) -> Outputs:
    here = locals()
    settings = (mode, num_ignore, over_unannotated, gammas, margin, detach_focal, kernel)
    return _run({name: here[name] for name in _NAMES}, settings)


@_operator.register_fake
def _(logits: Tensor, *_: Any) -> Outputs:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    per_row = logits.new_empty(logits.shape[0], dtype=dtype)
    gradient = logits.new_empty(logits.shape)
    return (
        per_row,
        gradient,
        logits.new_empty(5, dtype=torch.float64),
        logits.new_empty(5, dtype=torch.int64),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    _, gradient, sums, counts = output
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(gradient, sums, counts)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, grad_per_row: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (_scaled(gradient, grad_per_row), *[None] * (ctx.inputs - 1))


_operator.register_autograd(_backward, setup_context=_keep)
