"""Inputs of the fused operator: their types, checks, and the C structure that holds them.

Legend: B rows, A attributes, O objects, S feasible pairs, F feasible pairs of the batch's rows.
"""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig


class FeasibleTable(NamedTuple):
    """Omega_o of every object, resident on the device.

    Attributes:
        indptr: int64 [O + 1].
        indices: int32 [S], attributes ascending within an object.
        largest: number of attributes of the largest set, which decides how much of a GPU's shared
            memory a draw takes; 0: unknown, space for all attributes is reserved.
    """

    indptr: Tensor
    indices: Tensor
    largest: int = 0


class Draw(NamedTuple):
    """Inputs of the draw of Fig. 3; how many are drawn, and from which set, is in `LossConfig`.

    Attributes:
        weight_indptr: int64 [B + 1]; each row is as long as its object's feasible set; None: the
            weights are dense.
        inverse_weight: float32 [F], max likelihood / likelihood (`inverse_weights`); attributes
            whose weight is not positive and finite cannot be drawn. Dense: [B, A], of which the
            object's feasible attributes are read.
        uid, visit: int64 [B].
        seed: int64 [1].
    """

    weight_indptr: Tensor | None
    inverse_weight: Tensor
    uid: Tensor
    visit: Tensor
    seed: Tensor


class Labels(NamedTuple):
    """Annotations as a CSR matrix.

    Attributes:
        indptr: int64 [B + 1].
        code: int32, attribute * 2 + 1 for present, attribute * 2 for absent.
    """

    indptr: Tensor
    code: Tensor


Tensors = dict[str, Tensor | None]
"""Tensors by their names in the C structure."""
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Losses, gradient, sums and counts."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MODES = {"draw": 0, "list": 1, "mask": 2, "ignore": 3, "negatify": 4}
"""How ignored pairs are given: to be drawn, as attributes, as a mask; or all, or none."""

_POINTERS = (
    *("logits", "gradient", "label", "label_indptr", "label_code", "object_id"),
    *("feasible_indptr", "feasible_index", "weight_indptr", "inverse_weight", "uid", "visit"),
    *("seed", "drawn", "ignored", "row_weight", "per_row", "sums", "counts", "drawn_out"),
    *("keys", "partial"),
)
LAYOUT = struct.Struct(f"@{len(_POINTERS)}P7q4i")
"""`struct Arguments` of arguments.h; packed, as a ctypes structure takes three times as long."""


def pack(
    tensors: Tensors, mode: str, loss: LossConfig, *, largest: int = 0, threads: int = 1
) -> bytes:
    """The bytes of `struct Arguments`.

    Args:
        tensors: inputs and outputs, contiguous, `logits` and `gradient` along their rows. They
            must outlive the call.
        mode: a name of `MODES`.
        loss: its `num_ignore` and `draw_over` are used; `LossConfig.options` are passed apart
            from this structure.
        largest: on CUDA, the size of the largest feasible set.
        threads: on the CPU, the most threads used.
    """
    logits = tensors["logits"]
    assert logits is not None
    rows, attributes = logits.shape
    gradient, drawn = tensors.get("gradient"), tensors.get("drawn")
    drawn = tensors.get("drawn_out") if drawn is None else drawn
    found = map(tensors.get, _POINTERS)
    return LAYOUT.pack(
        *[0 if tensor is None else tensor.data_ptr() for tensor in found],
        rows,
        attributes,
        *(t.stride(0) if t is not None and rows > 1 else attributes for t in (logits, gradient)),
        0 if drawn is None else drawn.shape[1],
        -1 if loss.num_ignore == "all" else loss.num_ignore,
        largest,
        MODES[mode],
        KINDS[logits.dtype],
        loss.draw_over == "unannotated",
        threads,
    )


OPTIONS = f"-DVLAL_OPTIONS={''.join(f'OPTION({name})' for name in LossConfig().options)}"
"""Define of the names of `LossConfig.options`, which `struct Loss` of focal.h expands."""


TYPES = {
    "label": (torch.int8, "[B, A]"),
    "label_indptr": (torch.int64, "[B + 1]"),
    "label_code": (torch.int32, ""),
    "object_id": (torch.int64, "[B]"),
    "feasible_indptr": (torch.int64, ""),
    "feasible_index": (torch.int32, ""),
    "weight_indptr": (torch.int64, "[B + 1]"),
    "inverse_weight": (torch.float32, ""),
    "uid": (torch.int64, "[B]"),
    "visit": (torch.int64, "[B]"),
    "seed": (torch.int64, "[1]"),
    "drawn": (torch.int32, "[B, k]"),
    "ignored": (torch.bool, "[B, A]"),
    "row_weight": (torch.float32, "[B]"),
}
"""Inputs beside the logits: type, and shape where it follows from the logits'."""


def check(logits: Tensor, tensors: Tensors) -> None:
    """Check shapes, types and devices; values (ids within their tables) are the caller's to check.

    Args:
        logits: [B, A].
        tensors: entries of `TYPES`.

    Raises:
        ValueError: a tensor does not fit.
    """
    if logits.dim() != 2 or logits.dtype not in (*KINDS, torch.float64):
        raise ValueError(f"logits: {logits.dtype} {list(logits.shape)}; give floating [B, A]")
    rows, attributes = logits.shape
    shapes = {
        "[B, A]": (rows, attributes),
        "[B]": (rows,),
        "[B + 1]": (rows + 1,),
        "[1]": (1,),
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtype, form = TYPES[name]
        if name == "inverse_weight" and tensors.get("weight_indptr") is None:
            form = "[B, A]"
        wanted = (rows, tensor.shape[-1]) if form == "[B, k]" else shapes.get(form, tensor.shape)
        if tensor.dtype != dtype or tensor.shape != wanted or tensor.device != logits.device:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; give {dtype} "
                f"{form} with B = {rows}, A = {attributes} on {logits.device}"
            )
