"""The selective loss with its draw as one operator: Eqs. (1), (3), (4) and Fig. 3 in one pass.

It gives the same numbers as `method/`, which tests use as the oracle: the draw bit for bit, losses
and gradients within float32. `method/selective_loss.py` has the table of terms.

Legend: B rows, A attributes.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cpu, cuda, reference
from vlal_dist.kernels.arguments import (
    TYPES,
    Draw,
    FeasibleTable,
    Labels,
    Outputs,
    Tensors,
    check,
)
from vlal_dist.kernels.backend import choose
from vlal_dist.method.selective_loss import LossTerms

Kernel = Literal["auto", "reference"]
KERNELS = get_args(Kernel)


def selective_loss(
    logits: Tensor,
    *,
    label: Tensor | Labels,
    object_id: Tensor,
    feasible: FeasibleTable,
    ignored: Draw | Tensor | None,
    loss: LossConfig,
    row_weight: Tensor | None = None,
    kernel: Kernel = "auto",
    in_place: bool = False,
) -> LossTerms:
    """Losses of all rows; their gradient is computed in the same pass.

    All values but the logits' are checked where they are read: on a GPU by the programs, which end
    in a device-side assertion, as torch's own do.

    Args:
        logits: float32, bfloat16 or float16 [B, A], or float64, which the reference computes; rows
            may be strided.
        label: int8 [B, A] (+1 present, -1 absent, 0 unannotated), or CSR.
        object_id: int64 [B].
        feasible: Omega_o of all objects; sets of objects that no row has may be left unchecked.
        ignored: the draw of Fig. 3; or drawn attributes, int32 [B, k], -1 where there are fewer;
            or a mask, bool [B, A]; or None where all unannotated pairs are ignored or none, as
            `loss.unannotated` says.
        loss: exponents, margin, and how the draw is made.
        row_weight: float32 [B], >= 0, or None for 1; a row of weight 0 has no loss, whatever its
            logits.
        kernel: `auto` takes the fastest backend (`backend.choose`), `reference` the readable one.
        in_place: the gradient takes the logits' memory, and so may a call that is refused; torch
            refuses a backward pass that needs them. No effect under torch.compile.

    Returns:
        Losses [B] (float32, float64 of float64 logits), sums and counts of the terms.

    Raises:
        ConfigError: `ignored` is None, but `loss.unannotated` is neither `ignore` nor `negatify`;
            another kernel.
        TypeError: an argument of another type, or missing.
        ValueError: tensors whose shapes or types do not fit, or values that are not allowed: an
            object outside of the table, a label that is none, an inverse weight below 1 or NaN,
            an attribute beyond A, a negative or infinite row weight; `in_place` of a leaf, or of
            logits that share memory. On a GPU values end in a device-side assertion (RuntimeError).
    """
    _check_settings(feasible, loss, kernel)
    tensors: Tensors = {
        "object_id": object_id,
        "feasible_indptr": feasible.indptr,
        "feasible_index": feasible.indices,
        "row_weight": row_weight,
    }
    if isinstance(label, Labels):
        tensors |= {"label_indptr": label.indptr, "label_code": label.code}
    else:
        tensors["label"] = label
    mode: str = loss.unannotated
    if isinstance(ignored, Draw):
        mode = "draw"
        tensors |= ignored._asdict()
    elif isinstance(ignored, Tensor):
        mode, name = ("mask", "ignored") if ignored.dtype == torch.bool else ("list", "drawn")
        tensors[name] = ignored
    elif ignored is not None:
        raise TypeError(f"ignored: {type(ignored).__name__}; give a Draw, a tensor or None")
    elif mode not in ("ignore", "negatify"):
        raise ConfigError(f"ignored is None, but the loss needs `{mode}`; give a Draw or a mask")
    if torch.compiler.is_compiling():  # which turns errors of the traced part into its own
        listed = [tensors.get(name) for name in TYPES]
        options, sizes = _numbers(loss, feasible.largest)
        per_row, _, sums, counts = compiled_loss(logits, listed, options, sizes, mode, kernel)
    else:
        check(logits, tensors, mode)
        if in_place:
            _check_in_place(logits)
        given = (tensors, mode, loss, feasible.largest, kernel)
        per_row, sums, counts = EagerLoss.apply(logits, in_place, *given)  # type: ignore[no-untyped-call]
    return LossTerms(per_row, sums, counts)


def _check_settings(feasible: FeasibleTable, loss: LossConfig, kernel: str) -> None:
    """Raise for what is no tensor."""
    if not isinstance(feasible, FeasibleTable):
        raise TypeError(f"feasible: {type(feasible).__name__}; give a FeasibleTable")
    if not isinstance(loss, LossConfig):
        raise TypeError(f"loss: {type(loss).__name__}; give a LossConfig")
    if not 0 <= feasible.largest < 2**31:
        raise ValueError(
            f"feasible.largest is {feasible.largest}; give the largest set's size, or 0"
        )
    if kernel not in KERNELS:
        raise ConfigError(f"kernel is {kernel!r}; give one of {', '.join(KERNELS)}")


def _check_in_place(logits: Tensor) -> None:
    """Raise where the gradient cannot take the logits' memory."""
    if logits.requires_grad and logits.is_leaf:
        raise ValueError("in_place: the logits are a leaf, which keeps its values; give a copy")
    (rows, attributes), (row, column) = logits.shape, logits.stride()
    apart = (rows < 2 or row > column * (attributes - 1)) and (attributes < 2 or column > 0)
    if not apart and not (row > 0 and column > row * (rows - 1)):
        raise ValueError("in_place: elements of the logits share memory; give a copy")


def _run(
    logits: Tensor,
    in_place: bool,
    tensors: Tensors,
    mode: str,
    loss: LossConfig,
    largest: int,
    kernel: str,
) -> Outputs:
    """Compute losses and gradient on the backend of the logits' device."""
    laid = {n: None if t is None else t.contiguous() for n, t in tensors.items()}
    for name in ("inverse_weight", "row_weight"):
        laid[name] = _with_signs(laid.get(name))
    logits = _with_signs(logits)
    # Rows may be strided, elements of a row may not.
    laid["logits"] = logits if logits.stride(1) == 1 else logits.contiguous()
    if in_place and logits.stride(0) >= logits.shape[1]:  # rows do not overlap
        laid["gradient"] = laid["logits"]
    backend = choose(logits.device.type).name if kernel == "auto" else kernel
    if backend == "reference" or logits.dtype == torch.float64:
        return reference.run(laid, mode, loss)
    return cpu.run(laid, mode, loss) if backend == "cpu" else cuda.run(laid, mode, loss, largest)


def _with_signs(tensor: Any) -> Any:
    """The tensor with the memory of its values: a view may have their signs changed."""
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


class EagerLoss(torch.autograd.Function):
    """The operator outside of torch.compile: a third of the registered operator's overhead."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, in_place: bool, *given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, sums, counts; keeps the gradient."""
        per_row, gradient, sums, counts = _run(logits, in_place, *given)
        if in_place:  # no copy of what lies there already, but a new version of the logits
            gradient = logits.detach().copy_(gradient)
        ctx.in_place = in_place
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums, counts)
        return per_row, sums, counts

    @staticmethod
    def backward(ctx: Any, grad_per_row: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradient, scaled by row."""
        return _scaled(ctx, grad_per_row, eager=True, in_place=ctx.in_place), *[None] * 6


def _scaled(ctx: Any, by_row: Tensor, *, eager: bool = False, in_place: bool = False) -> Tensor:
    """The kept gradient times that of each row's loss.

    Raises:
        RuntimeError: within create_graph: the gradient has no derivative of its own.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the fused selective loss cannot be differentiated twice")
    gradient: Tensor
    (gradient,) = ctx.saved_tensors
    # Of a plain sum: another pass would only multiply by 1. A traced tensor has no value.
    same = eager and by_row.is_cpu and by_row.stride() == (0,) and len(by_row) > 0
    if same and by_row[0].item() == 1.0:
        return gradient
    if in_place and gradient.dtype == by_row.dtype:
        return gradient.mul_(by_row[:, None])
    # In float32 also for 16 bits, which do not hold a loss scale of 65536.
    return (gradient * by_row[:, None]).to(gradient.dtype)


@torch.library.custom_op("vlal::selective_loss", mutates_args=())
def compiled_loss(
    logits: Tensor,
    tensors: Sequence[Tensor | None],
    options: Sequence[float],
    sizes: Sequence[int],
    mode: str,
    kernel: str,
) -> Outputs:
    """Losses, gradient, sums and counts, for torch.compile.

    Args:
        logits: [B, A].
        tensors: the others in the order of `TYPES`.
        options, sizes: `_numbers` of the loss and the table.
        mode: a name of `MODES`.
        kernel: as `selective_loss` takes it.
    """
    named = dict(zip(TYPES, tensors, strict=True))
    check(logits, named, mode)
    loss = _loss_of(tuple(options), *sizes[:2])
    return _run(logits, False, named, mode, loss, sizes[2], kernel)


def _numbers(loss: LossConfig, largest: int) -> tuple[list[float], list[int]]:
    """What `_run` reads of a loss and a feasible table, as the dispatcher takes it."""
    num_ignore = -1 if loss.num_ignore == "all" else loss.num_ignore
    over_unannotated = int(loss.draw_over == "unannotated")
    return list(loss.options.values()), [num_ignore, over_unannotated, largest]


@cache
def _loss_of(options: tuple[float, ...], num_ignore: int, over_unannotated: int) -> LossConfig:
    """The loss that `_numbers` was given, as a row of Table 1 that has its own exponents."""
    named: dict[str, Any] = dict(zip(LossConfig().options, options, strict=True))
    return LossConfig(
        **named,
        num_ignore="all" if num_ignore < 0 else num_ignore,
        draw_over="unannotated" if over_unannotated else "feasible",
    )


@compiled_loss.register_fake
def _(logits: Tensor, *_: Any) -> Outputs:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(logits.shape[:1], dtype=dtype),
        logits.new_empty(logits.shape),
        logits.new_empty(5, dtype=torch.float64),
        logits.new_empty(5, dtype=torch.int64),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    _, gradient, sums, counts = output
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(gradient, sums, counts)


def _backward(ctx: Any, grad_per_row: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _scaled(ctx, grad_per_row), *[None] * 5


compiled_loss.register_autograd(_backward, setup_context=_keep)
