"""The selective loss as torch knows it: gradient, registration, and who does the work."""

from typing import Any

import torch
from torch import Tensor

from vlal_dist.kernels import cpu, cuda, reference
from vlal_dist.kernels.arguments import NAMES, Asked, Outputs, Tensors
from vlal_dist.kernels.backend import choose

Settings = tuple[str, int, bool, list[float], float, bool, int, str]
"""mode, num_ignore, over_unannotated, gammas, margin, detach_focal, largest, kernel."""


class EagerLoss(torch.autograd.Function):
    """Outside of torch.compile: a third of the registered operator's overhead."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tensors: Tensors, settings: Settings, in_place: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, sums, counts; keeps the gradient."""
        if in_place:
            tensors["gradient"] = logits
        per_row, gradient, sums, counts = _run(tensors, settings)
        if in_place:
            # Whoever kept these logits for its own gradient is told that they are gone.
            torch.autograd.graph.increment_version(logits)
            gradient = logits.detach()
        ctx.save_for_backward(gradient)
        ctx.in_place = in_place
        ctx.mark_non_differentiable(sums, counts)
        return per_row, sums, counts

    @staticmethod
    def backward(ctx: Any, grad_per_row: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradient, scaled by row."""
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, grad_per_row, in_place=ctx.in_place), None, None, None


def _scaled(gradient: Tensor, by_row: Tensor, *, in_place: bool) -> Tensor:
    """The gradient times that of each row's loss.

    Raises:
        RuntimeError: within create_graph: the gradient has no derivative of its own.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the fused selective loss cannot be differentiated twice")
    if by_row.stride() == (0,) and by_row.is_cpu and len(by_row) and by_row[0].item() == 1.0:
        return gradient  # of a plain sum: another pass would only multiply by 1
    if in_place and gradient.dtype == by_row.dtype:
        return gradient.mul_(by_row[:, None])
    # In float32 also for 16 bits, which do not hold a loss scale of 65536.
    return (gradient * by_row[:, None]).to(gradient.dtype)


def _run(tensors: Tensors, settings: Settings) -> Outputs:
    """By the backend of the logits' device."""
    mode, num_ignore, over_unannotated, gammas, margin, detach_focal, largest, kernel = settings
    positive, negative, feasible, infeasible = gammas
    logits = tensors["logits"]
    assert logits is not None
    laid = {n: None if t is None else t.contiguous() for n, t in tensors.items()}
    if logits.stride(1) == 1:  # rows may lie apart, elements of a row may not
        laid["logits"] = logits
        laid["gradient"] = tensors.get("gradient")
    asked = Asked(
        mode=mode,
        num_ignore=num_ignore,
        over_unannotated=over_unannotated,
        gammas=(positive, negative, feasible, infeasible),
        margin=margin,
        detach_focal=detach_focal,
    )
    backend = choose(logits.device.type).name if kernel == "auto" else kernel
    if backend == "cpu":
        return cpu.run(laid, **asked)
    if backend == "cuda" and logits.dtype != torch.float64:
        return cuda.run(laid, largest=largest, **asked)
    return reference.run(laid, **asked)


@torch.library.custom_op("vlal::selective_loss", mutates_args=())
def compiled_loss(
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
    largest: int,
    kernel: str,
) -> Outputs:
    """Losses, gradient, sums and counts, for torch.compile."""
    here = locals()
    settings = (mode, num_ignore, over_unannotated, gammas, margin, detach_focal, largest, kernel)
    return _run({name: here[name] for name in NAMES}, settings)


@compiled_loss.register_fake
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
    scaled = _scaled(gradient, grad_per_row, in_place=False)
    return (scaled, *[None] * (ctx.inputs - 1))


compiled_loss.register_autograd(_backward, setup_context=_keep)
