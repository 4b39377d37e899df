"""Eq. (2) from the features of any vision-language model, as tensors on any device.

`likelihood.py` has the same softmax for stored similarities, in numpy; scoring uses that.

Shapes: B crops, A attributes, D feature width.
"""

import math

import torch
from torch import Tensor

from vlal_dist.errors import ConfigError, DataError
from vlal_dist.method.feasible import FeasibleSets


def clip_likelihood(
    image_features: Tensor,
    text_features: Tensor,
    *,
    temperature: float = 0.01,
    feasible: FeasibleSets | None = None,
    object_id: Tensor | None = None,
) -> Tensor:
    """g(a | x, o), Eq. (2): softmax over Omega_o of cosine similarity / temperature.

    Features are normalised here. Nothing is recorded for a gradient.

    Args:
        image_features: floating [B, D], any length of vectors.
        text_features: floating [A, D], of prompts such as "a photo of red car"; or [B, A, D], where
            prompts name the object of each crop.
        temperature: tau > 0 (CLIP: 0.01, the inverse of its logit scale).
        feasible: Omega_o of every object (Sec. 2.2); None: every attribute is feasible.
        object_id: integers [B], each an object of `feasible`, which needs it.

    Returns:
        float32 [B, A]; each row sums to 1 over its object's set, is 0 elsewhere, and all 0 where
        the set is empty. A likelihood below 1e-45 is 0: such an attribute is never drawn.

    Raises:
        ConfigError: the temperature is not positive and finite (a ValueError).
        DataError: features that do not fit, are not finite or of length 0; objects outside of the
            sets, or missing (a ValueError).

    Example:
        >>> import torch, vlal_dist as vlal
        >>> image = torch.tensor([[1.0, 0.0]])
        >>> text = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> vlal.clip_likelihood(image, text, temperature=0.5)
        tensor([[0.5910, 0.0800, 0.3290]])
        >>> sets = vlal.FeasibleSets.from_labels([0], [[1, 1, 0]])
        >>> vlal.clip_likelihood(
        ...     image, text, temperature=0.5, feasible=sets, object_id=torch.tensor([0])
        ... )
        tensor([[0.8808, 0.1192, 0.0000]])
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature}; give a positive number (CLIP: 0.01)")
    image, text = (
        _unit_vectors(name, tensor)
        for name, tensor in (("image_features", image_features), ("text_features", text_features))
    )
    fits = image.dim() == 2 and text.dim() in (2, 3) and image.shape[-1] == text.shape[-1]
    if not fits or image.device != text.device or (text.dim() == 3 and len(text) != len(image)):
        raise DataError(
            f"image_features {list(image.shape)} on {image.device} and text_features "
            f"{list(text.shape)} on {text.device}; give [B, D], and [A, D] or [B, A, D], "
            "on one device"
        )
    similarity = image @ text.T if text.dim() == 2 else torch.einsum("bd,bad->ba", image, text)
    scaled = similarity / temperature
    if feasible is not None:
        members = _members(feasible, object_id, scaled)
        scaled = scaled.masked_fill(~members, -torch.inf)
    # An empty set's row is all -inf, whose softmax is NaN.
    return torch.softmax(scaled, dim=1).nan_to_num(0.0).to(torch.float32)


def _unit_vectors(name: str, features: Tensor) -> Tensor:
    """Vectors of length 1, float64: tau magnifies what the similarity is off by."""
    if not features.is_floating_point():
        raise DataError(f"{name}: {features.dtype}; give floating features")
    vectors = features.detach().to(torch.float64)
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    if not bool(((length > 0) & length.isfinite()).all()):
        raise DataError(f"{name}: a vector is not finite, or has length 0; encode it again")
    unit: Tensor = vectors / length
    return unit


def _members(feasible: FeasibleSets, object_id: Tensor | None, scaled: Tensor) -> Tensor:
    """Omega_o of each row, bool [B, A]."""
    if object_id is None:
        raise DataError("object_id: missing; give the object of each row, integers [B]")
    ids = object_id.detach().cpu()
    kind = ids.dtype
    if ids.shape != scaled.shape[:1] or kind.is_floating_point or kind in (torch.bool,):
        raise DataError(f"object_id: {kind} {list(ids.shape)}; give integers [{len(scaled)}]")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < feasible.num_objects:
        raise DataError(
            f"object_id: from {int(ids.min())} to {int(ids.max())}; the sets have the objects "
            f"0..{feasible.num_objects - 1}"
        )
    mask = torch.from_numpy(feasible.mask(scaled.shape[1]))
    return mask[ids.to(torch.int64)].to(scaled.device)
