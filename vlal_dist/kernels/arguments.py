"""The operator's arguments as the C structure that CPU and CUDA share."""

import struct
from typing import TypedDict, Unpack

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]
"""By their names in the structure."""
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Losses, gradient, sums and counts."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
MODES = {"draw": 0, "list": 1, "ignore": 2, "negatify": 3, "mask": 4}

_POINTERS = (
    *("logits", "gradient", "label", "label_indptr", "label_code", "object_id"),
    *("feasible_indptr", "feasible_index", "weight_indptr", "inverse_weight", "uid", "visit"),
    *("seed", "drawn", "ignored", "row_weight", "per_row", "sums", "counts", "drawn_out"),
    *("keys", "partial"),
)
_LAYOUT = struct.Struct(f"@{len(_POINTERS)}P7q5d5i4x")
"""`struct Arguments` of arguments.h; packed, as a ctypes structure takes three times as long."""


class Asked(TypedDict):
    """What a backend is asked for, by keyword.

    Attributes:
        mode: a name of `MODES`.
        num_ignore, over_unannotated: of the draw.
        gammas, margin, detach_focal: of the loss.
    """

    mode: str
    num_ignore: int
    over_unannotated: bool
    gammas: tuple[float, float, float, float]
    margin: float
    detach_focal: bool


def draw_alone(num_ignore: int, over_unannotated: bool) -> Asked:
    """A draw without a loss."""
    return Asked(
        mode="draw",
        num_ignore=num_ignore,
        over_unannotated=over_unannotated,
        gammas=(0.0, 0.0, 0.0, 0.0),
        margin=0.0,
        detach_focal=False,
    )


def pack(
    tensors: Tensors,
    *,
    attributes: int,
    threads: int = 1,
    largest: int = 0,
    **asked: Unpack[Asked],
) -> bytes:
    """The structure's bytes.

    Args:
        tensors: by their names in the structure, outputs included; contiguous, `logits` and
            `gradient` along their rows. They must outlive the call. Without `logits` there is
            a draw and no loss.
        attributes: A.
        threads: on the CPU, at most so many.
        largest: on CUDA, the size of the greatest feasible set.
        asked: see `Asked`.
    """
    logits, gradient, object_id = (tensors.get(n) for n in ("logits", "gradient", "object_id"))
    assert object_id is not None
    drawn = tensors.get("drawn")
    if drawn is None:
        drawn = tensors.get("drawn_out")
    found = map(tensors.get, _POINTERS)
    rows = len(object_id)
    apart = [attributes if t is None or rows < 2 else t.stride(0) for t in (logits, gradient)]
    return _LAYOUT.pack(
        *[0 if tensor is None else tensor.data_ptr() for tensor in found],
        rows,
        attributes,
        *apart,
        0 if drawn is None else drawn.shape[1],
        asked["num_ignore"],
        largest,
        *asked["gammas"],
        asked["margin"],
        MODES[asked["mode"]],
        0 if logits is None else KINDS[logits.dtype],
        asked["detach_focal"],
        asked["over_unannotated"],
        threads,
    )
