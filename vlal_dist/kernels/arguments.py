"""Arguments of the fused operator: types, checks, and the C structure shared by CPU and CUDA.

Legend: B rows, A attributes, O objects, S feasible pairs, F feasible pairs of the batch's rows.
"""

import struct
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor


class FeasibleTable(NamedTuple):
    """Omega_o of every object, resident on the device.

    Attributes:
        indptr: int64 [O + 1].
        indices: int32 [S], attributes ascending within an object.
        largest: attributes of the greatest set, which decides how much of a GPU's memory a draw
            takes; 0: not known, all attributes are provided for.
    """

    indptr: Tensor
    indices: Tensor
    largest: int = 0


class Draw(NamedTuple):
    """The draw of Fig. 3, inside of the operator.

    Attributes:
        weight_indptr: int64 [B + 1]; each row is as long as its object's feasible set.
        inverse_weight: float32 [F], max likelihood / likelihood (`inverse_weights`); what is not
            positive and finite cannot be drawn.
        num_ignore: NUM_IGNORE >= 0; -1: the whole drawing set.
        over_unannotated: draw among the unannotated feasible attributes alone.
        uid, visit: int64 [B].
        seed: int64 [1].
    """

    weight_indptr: Tensor
    inverse_weight: Tensor
    num_ignore: int
    over_unannotated: bool
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
"""Name -> type, and shape where there is one to hold it to."""
NAMES = ("logits", *TYPES)


def check_logits(logits: Tensor) -> None:
    """Type and dimensions.

    Raises:
        ValueError: they do not fit.
    """
    if logits.dim() != 2 or logits.dtype not in KINDS:
        raise ValueError(f"logits: {logits.dtype} {list(logits.shape)}, floating [B, A] is needed")


def check(tensors: Tensors, *, rows: int, attributes: int, device: torch.device) -> None:
    """Shapes, types and devices; values (ids within their tables) are the caller's.

    Args:
        tensors: of `TYPES`, by name.
        rows: B.
        attributes: A.
        device: of all.

    Raises:
        ValueError: something does not fit.
    """
    shapes = {
        "[B, A]": (rows, attributes),
        "[B]": (rows,),
        "[B + 1]": (rows + 1,),
        "[1]": (1,),
    }
    for name, tensor in tensors.items():
        if tensor is None or name == "logits":
            continue
        dtype, form = TYPES[name]
        wanted = (rows, tensor.shape[-1]) if form == "[B, k]" else shapes.get(form, tensor.shape)
        if tensor.dtype != dtype or tensor.shape != wanted or tensor.device != device:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; {dtype} "
                f"{form} with B = {rows}, A = {attributes} on {device} is needed"
            )
