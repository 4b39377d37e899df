"""Inputs of the fused operator: their types, checks, and the C structure that holds them.

Legend: B rows, A attributes, O objects, S feasible pairs, F feasible pairs of the batch's rows.
"""

import re
import struct
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig

SOURCES = Path(__file__).with_name("src")


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
        inverse_weight: float32 [F], max likelihood / likelihood of the row (`inverse_weights`),
            >= 1; infinite: cannot be drawn. Dense: [B, A], of which the object's feasible
            attributes are read.
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
LAYOUT = struct.Struct(f"@{len(_POINTERS)}P11q4i")
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
        _length(tensors, "feasible_indptr") - 1,
        _length(tensors, "feasible_index"),
        _length(tensors, "label_code"),
        _length(tensors, "inverse_weight"),
        -1 if loss.num_ignore == "all" else min(loss.num_ignore, attributes),
        largest,
        MODES[mode],
        KINDS[logits.dtype],
        loss.draw_over == "unannotated",
        threads,
    )


OPTIONS = f"-DVLAL_OPTIONS={''.join(f'OPTION({name})' for name in LossConfig().options)}"
"""Define of the names of `LossConfig.options`, which `struct Loss` of focal.h expands."""


def _length(tensors: Tensors, name: str) -> int:
    tensor = tensors.get(name)
    return 0 if tensor is None else tensor.shape[0]


PROBLEMS: tuple[str, ...] = tuple(
    re.findall(r'^PROBLEM\(\w+, "(.*)"\)$', (SOURCES / "problems.h").read_text(), re.M)
)
"""What can be wrong with a row's values, `enum Problem` of arguments.h from 1 on."""


def refuse(row: int, problem: int) -> NoReturn:
    """Raise for a row whose values are not allowed.

    Args:
        row: its number.
        problem: `enum Problem`, not kFine.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{PROBLEMS[problem - 1]} (row {row})")


TYPES = {
    "label": (torch.int8, "[B, A]"),
    "label_indptr": (torch.int64, "[B + 1]"),
    "label_code": (torch.int32, "[N]"),
    "object_id": (torch.int64, "[B]"),
    "feasible_indptr": (torch.int64, "[O + 1]"),
    "feasible_index": (torch.int32, "[S]"),
    "weight_indptr": (torch.int64, "[B + 1]"),
    "inverse_weight": (torch.float32, "[F]"),
    "uid": (torch.int64, "[B]"),
    "visit": (torch.int64, "[B]"),
    "seed": (torch.int64, "[1]"),
    "drawn": (torch.int32, "[B, k]"),
    "ignored": (torch.bool, "[B, A]"),
    "row_weight": (torch.float32, "[B]"),
}
"""Inputs beside the logits: type and shape."""
_SETS = ("object_id", "feasible_indptr", "feasible_index")
_NEEDED = {
    "draw": (*_SETS, "inverse_weight", "uid", "visit", "seed"),
    "list": (*_SETS, "drawn"),
    "mask": (*_SETS, "ignored"),
    "ignore": _SETS,
    "negatify": _SETS,
}
"""Inputs that a mode needs beside the labels."""


def check(logits: Tensor, tensors: Tensors, mode: str) -> None:
    """Check presence, shapes, types and devices; the backends check values.

    Args:
        logits: [B, A].
        tensors: entries of `TYPES`.
        mode: a name of `MODES`.

    Raises:
        TypeError: no tensor, or none where one is needed.
        ValueError: a tensor does not fit.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: {type(logits).__name__}; give a tensor, floating [B, A]")
    device, layout = logits.device, torch.strided
    fits = logits.dim() == 2 and (logits.dtype in KINDS or logits.dtype == torch.float64)
    if not fits or logits.layout != layout:
        form = f"{logits.dtype} {list(logits.shape)} {logits.layout}"
        raise ValueError(f"logits: {form}; give floating [B, A], not sparse")
    if device.type == "meta":
        raise ValueError("logits: on meta, where tensors have no values; give them on a device")
    rows, attributes = logits.shape
    shapes = {
        "[B, A]": (rows, attributes),
        "[B]": (rows,),
        "[B + 1]": (rows + 1,),
        "[1]": (1,),
    }
    labels = ("label",) if tensors.get("label_indptr") is None else ("label_indptr", "label_code")
    for name in (*labels, *_NEEDED[mode]):
        if tensors.get(name) is None:
            raise TypeError(f"{name}: None; give a tensor, {' '.join(map(str, TYPES[name]))}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if type(tensor) is not Tensor and not isinstance(tensor, Tensor):  # the first is fast
            raise TypeError(f"{name}: {type(tensor).__name__}; give a tensor, {TYPES[name][0]}")
        dtype, form = TYPES[name]
        if name == "inverse_weight" and tensors.get("weight_indptr") is None:
            form = "[B, A]"
        shape = tensor.shape
        if form in shapes:
            fits = shape == shapes[form]
        elif form == "[B, k]":
            fits = len(shape) == 2 and shape[0] == rows
        else:
            fits = len(shape) == 1 and shape[0] >= (form == "[O + 1]")
        same = tensor.dtype == dtype and tensor.device == device and tensor.layout == layout
        if not (fits and same):
            raise ValueError(
                f"{name}: {tensor.dtype} {list(shape)} on {tensor.device}; give {dtype} "
                f"{form} with B = {rows}, A = {attributes} on {device}, not sparse"
            )
