"""The operator's arguments as the C structure that CPU and CUDA share."""

import struct

import torch
from torch import Tensor

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


def pack(
    tensors: dict[str, Tensor | None],
    *,
    attributes: int,
    mode: str,
    num_ignore: int,
    over_unannotated: bool,
    gammas: tuple[float, float, float, float],
    margin: float,
    detach_focal: bool,
    threads: int = 1,
    largest: int = 0,
) -> bytes:
    """The structure's bytes.

    Args:
        tensors: by their names in the structure, outputs included; contiguous, `logits` and
            `gradient` along their rows. They must outlive the call. Without `logits` there is
            a draw and no loss.
        attributes: A.
        mode: a name of `MODES`.
        num_ignore, over_unannotated, gammas, margin, detach_focal: of the operator.
        threads: on the CPU, at most so many.
        largest: on CUDA, the size of the greatest feasible set.
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
        num_ignore,
        largest,
        *gammas,
        margin,
        MODES[mode],
        0 if logits is None else KINDS[logits.dtype],
        detach_focal,
        over_unannotated,
        threads,
    )
