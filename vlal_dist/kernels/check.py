"""What the operator refuses: tensors that do not fit each other."""

import torch
from torch import Tensor

from vlal_dist.kernels.arguments import KINDS, Tensors

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
