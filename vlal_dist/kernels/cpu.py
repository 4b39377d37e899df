"""The operator on the CPU: the C++ library behind tensors.

Arguments are checked by `selective_loss.py`; here they are laid into the C structure.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlal_dist.kernels.arguments import pack
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
        tensors: by their names in the C structure; contiguous, `logits` along its rows. With
            `gradient`, which may be `logits` itself, that is written and returned.
        mode: a name of `arguments.MODES`.
        num_ignore, over_unannotated, gammas, margin, detach_focal: of the operator.
        threads: at most so many; None: torch's.
        variant: instruction set; None: the widest of this processor.
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
    most = torch.get_num_threads() if threads is None else threads
    arguments = pack(
        {**tensors, "gradient": gradient, "per_row": per_row, "sums": sums, "counts": counts},
        mode=mode,
        num_ignore=num_ignore,
        over_unannotated=over_unannotated,
        gammas=gammas,
        margin=margin,
        detach_focal=detach_focal,
        threads=max(1, min(most, rows * attributes // WORTH_A_THREAD)),
    )
    load(variant or instruction_set())(arguments)
    return per_row, gradient, sums, counts
