"""The operator on the CPU: the C++ library behind tensors.

Arguments are checked by `selective_loss.py`; here they are laid into the C structure.
"""

import ctypes
import functools
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


class Arguments(ctypes.Structure):
    """`struct Arguments` of cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "attributes", "stride", "num_ignore", "drawn_per_row")
        ),
        ("gamma", ctypes.c_double * 4),
        ("margin", ctypes.c_double),
        *(
            (name, ctypes.c_int32)
            for name in ("mode", "kind", "detach", "over_unannotated", "threads")
        ),
    )


@functools.cache
def load(variant: str) -> Callable[[Any], None]:
    """The C function of a variant, compiled if need be."""
    function: Any = ctypes.CDLL(str(build(variant))).vlal_selective_loss
    function.argtypes, function.restype = [ctypes.c_void_p], None
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
    made = {"gradient": gradient, "per_row": per_row, "sums": sums, "counts": counts}
    drawn = next(
        (t for t in (tensors.get("drawn"), tensors.get("drawn_out")) if t is not None), None
    )
    most = torch.get_num_threads() if threads is None else threads
    arguments = Arguments(
        **{n: t.data_ptr() for n, t in {**tensors, **made}.items() if t is not None},
        rows=rows,
        attributes=attributes,
        stride=logits.stride(0) if rows > 1 else attributes,
        num_ignore=num_ignore,
        drawn_per_row=0 if drawn is None else drawn.shape[1],
        gamma=(ctypes.c_double * 4)(*gammas),
        margin=margin,
        mode=MODES[mode],
        kind=KINDS[logits.dtype],
        detach=detach_focal,
        over_unannotated=over_unannotated,
        threads=max(1, min(most, rows * attributes // WORTH_A_THREAD)),
    )
    load(variant or instruction_set())(ctypes.byref(arguments))
    return per_row, gradient, sums, counts
