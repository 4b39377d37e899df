"""The operator on the CPU: the C++ library behind tensors.

Arguments are checked by `selective_loss.py`; here they are laid into the C structure.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from vlal_dist.kernels.arguments import Asked, Outputs, Tensors, draw_alone, pack
from vlal_dist.kernels.build import build, instruction_set

WORTH_A_THREAD = 16_384
"""Elements below which another thread costs more than it saves."""


@functools.cache
def load(variant: str) -> Callable[[Any], None]:
    """The C function of a variant, compiled if need be."""
    function: Any = ctypes.CDLL(str(build(variant))).vlal_selective_loss
    function.argtypes, function.restype = [ctypes.c_char_p], None
    return function  # type: ignore[no-any-return]


def run(
    tensors: Tensors,
    *,
    threads: int | None = None,
    variant: str | None = None,
    **asked: Unpack[Asked],
) -> Outputs:
    """Losses, gradient, sums and counts; see `selective_loss.selective_loss`.

    Args:
        tensors: by their names in the C structure; contiguous, `logits` along its rows. With
            `gradient`, which may be `logits` itself, that is written and returned.
        threads: at most so many; None: torch's.
        variant: instruction set; None: the widest of this processor.
        asked: see `Asked`.
    """
    logits = tensors["logits"]
    assert logits is not None
    rows, attributes = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gradient = tensors.get("gradient")
    if gradient is None:
        gradient = torch.empty(rows, attributes, dtype=logits.dtype)
    per_row, sums = torch.empty(rows, dtype=dtype), torch.empty(5, dtype=torch.float64)
    counts = torch.empty(5, dtype=torch.int64)
    if logits.numel() == 0:  # an empty tensor has no address
        return per_row.zero_(), gradient, sums.zero_(), counts.zero_()
    arguments = pack(
        {**tensors, "gradient": gradient, "per_row": per_row, "sums": sums, "counts": counts},
        attributes=attributes,
        threads=_threads(rows * attributes, threads),
        **asked,
    )
    load(variant or instruction_set())(arguments)
    return per_row, gradient, sums, counts


def draw(
    tensors: Tensors,
    attributes: int,
    num_ignore: int,
    over_unannotated: bool,
    *,
    threads: int | None = None,
    variant: str | None = None,
) -> Tensor:
    """The attributes drawn, int32 [B, k]; see `selective_loss.draw_ignored`.

    Args:
        tensors: as `run`, without logits.
        attributes: A.
        num_ignore: k >= 0.
        over_unannotated, threads, variant: as `run`.
    """
    object_id = tensors["object_id"]
    assert object_id is not None
    rows = len(object_id)
    drawn = torch.full((rows, min(num_ignore, attributes)), -1, dtype=torch.int32)
    if drawn.numel() == 0:
        return drawn
    unused = {"per_row": torch.empty(rows), "sums": torch.empty(5, dtype=torch.float64)}
    unused["counts"] = torch.empty(5, dtype=torch.int64)
    arguments = pack(
        {**tensors, **unused, "drawn_out": drawn},
        attributes=attributes,
        threads=_threads(rows * attributes, threads),
        **draw_alone(num_ignore, over_unannotated),
    )
    load(variant or instruction_set())(arguments)
    return drawn


def _threads(elements: int, most: int | None) -> int:
    most = torch.get_num_threads() if most is None else most
    return max(1, min(most, elements // WORTH_A_THREAD))
