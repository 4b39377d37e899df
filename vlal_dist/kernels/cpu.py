"""The operator on the CPU: the C++ library behind tensors.

Arguments are checked by `selective_loss.py`; here they are laid into the C structure.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlal_dist.kernels.build import build, instruction_set

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
MODES = {"draw": 0, "list": 1, "ignore": 2, "negatify": 3, "mask": 4}
WORTH_A_THREAD = 16_384
"""Elements below which another thread costs more than it saves."""

_POINTERS = (
    *("logits", "gradient", "label", "label_indptr", "label_code", "object_id"),
    *("feasible_indptr", "feasible_index", "weight_indptr", "inverse_weight", "uid", "visit"),
    *("seed", "drawn", "ignored", "row_weight", "per_row", "sums", "counts", "drawn_out"),
)
_LAYOUT = struct.Struct(f"@{len(_POINTERS)}P5q5d5i")
"""`struct Arguments` of arguments.h; packed, as a ctypes structure takes three times as long."""


@functools.cache
def load(variant: str) -> Callable[[Any], None]:
    """The C function of a variant, compiled if need be."""
    function: Any = ctypes.CDLL(str(build(variant))).vlal_selective_loss
    function.argtypes, function.restype = [ctypes.c_char_p], None
    return function  # type: ignore[no-any-return]


def run(
    tensors: dict[str, Tensor | None],
    *,
    mode: str,
    num_ignore: int,
    over_unannotated: bool,
    gammas: tuple[float, float, float, float],
    margin: float,
    detach_focal: bool,
    threads: int | None = None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, gradient, sums and counts; see `selective_loss.selective_loss`.

    Args:
        tensors: by their names in the C structure; contiguous, `logits` along its rows.
        mode: a name of `MODES`.
        num_ignore, over_unannotated, gammas, margin, detach_focal: of the operator.
        threads: at most so many; None: torch's.
        variant: instruction set; None: the widest of this processor.
    """
    logits = tensors["logits"]
    assert logits is not None
    rows, attributes = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gradient = torch.empty(rows, attributes, dtype=logits.dtype)
    per_row, sums = torch.empty(rows, dtype=dtype), torch.empty(5, dtype=torch.float64)
    counts = torch.empty(5, dtype=torch.int64)
    if logits.numel() == 0:  # an empty tensor has no address
        return per_row.zero_(), gradient, sums.zero_(), counts.zero_()
    given = {**tensors, "gradient": gradient, "per_row": per_row, "sums": sums, "counts": counts}
    drawn = given.get("drawn")
    if drawn is None:
        drawn = given.get("drawn_out")
    found = map(given.get, _POINTERS)
    most = torch.get_num_threads() if threads is None else threads
    arguments = _LAYOUT.pack(
        *[0 if tensor is None else tensor.data_ptr() for tensor in found],
        rows,
        attributes,
        logits.stride(0) if rows > 1 else attributes,
        num_ignore,
        0 if drawn is None else drawn.shape[1],
        *gammas,
        margin,
        MODES[mode],
        KINDS[logits.dtype],
        detach_focal,
        over_unannotated,
        max(1, min(most, rows * attributes // WORTH_A_THREAD)),
    )
    load(variant or instruction_set())(arguments)
    return per_row, gradient, sums, counts
