"""Batch of samples, and its transfer to the device.

Legend: B rows of a batch, A attributes, S image side, F feasible pairs of the batch's rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlal_dist.data.format.images import IMAGENET_MEAN, IMAGENET_STD
from vlal_dist.data.hashing import uid_to_hex
from vlal_dist.data.loading.decode import decode_on
from vlal_dist.errors import DataError


@dataclass
class Batch:
    """Rows ready for a forward pass.

    Attributes:
        image: uint8 [B, 3, S, S], as loaded; float32 after `on_device`.
        flip: bool [B], whether the image is to be mirrored; done by `on_device`.
        object_id: int64 [B].
        label: int8 [B, A]; +1 annotated present, -1 annotated absent, 0 unannotated.
        uid: int64 [B], the bits of the unsigned uid.
        visit: int64 [B], running count of the sample's planned visits.
        row: int64 [B], row of the corpus.
        row_weight: float32 [B]; 0 for a dummy row.
        weight_indptr: int64 [B + 1], rows of `inverse_weight`; None where the samples have no
            likelihood.
        inverse_weight: float32 [F], (max likelihood) / likelihood of each row's feasible set, in
            the set's order; not finite where it cannot be drawn. None as above.
        jpgs: the JPEG of each row if the device decodes (`image` has no rows until `decoded`);
            None: decoded already.
        normalize: whether `on_device` applies ImageNet's mean and standard deviation.
    """

    image: Tensor
    flip: Tensor
    object_id: Tensor
    label: Tensor
    uid: Tensor
    visit: Tensor
    row: Tensor
    row_weight: Tensor
    weight_indptr: Tensor | None
    inverse_weight: Tensor | None
    jpgs: list[bytes] | None = None
    normalize: bool = False

    def __len__(self) -> int:
        return len(self.row)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def decoded(batch: Batch, device: torch.device) -> Batch:
    """Decode the JPEGs that a batch may carry, on the device.

    Raises:
        DataError: one of them is no whole JPEG; names its uid.
    """
    if batch.jpgs is None:
        return batch
    side = batch.image.shape[-1]
    try:
        image = decode_on(batch.jpgs, side=side, device=device)
    except DataError:
        for uid, jpg in zip(batch.uid.tolist(), batch.jpgs, strict=True):
            try:
                decode_on([jpg], side=side, device=device)
            except DataError as error:
                raise DataError(
                    f"sample uid {uid_to_hex(uid)}: {error}; set data.decode cpu, or pack the "
                    "photos into a new paths.dataset"
                ) from None
        raise
    return replace(batch, image=image.round().clamp(0, 255).to(torch.uint8), jpgs=None)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device; its images become float32 in [0, 1] (or normalised), mirrored.

    Bytes are copied, a quarter of the size of floats. Images that are floats already stay as they
    are.
    """
    if device.type != "cpu":
        moved = {name: t.to(device, non_blocking=True) for name, t in batch.tensors().items()}
        batch = replace(batch, **moved)  # type: ignore[arg-type]
    if batch.image.is_floating_point():
        return batch
    image = to_floats(batch.image, normalize=batch.normalize)
    image[batch.flip] = image[batch.flip].flip(-1)
    return replace(batch, image=image)


def to_floats(image: Tensor, *, normalize: bool) -> Tensor:
    """The model's input: float32 [B, 3, S, S] in [0, 1], or ImageNet-normalised.

    Args:
        image: uint8 [B, 3, S, S], of any memory layout.
        normalize: subtract ImageNet's mean, divide by its standard deviation.
    """
    # Channels last, as images are loaded: convolutions are fastest so (docs/experiments.md).
    floats = image.to(torch.float32, memory_format=torch.channels_last) * (1 / 255)
    if normalize:
        mean, std = (floats.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        floats = floats.sub_(mean).div_(std)
    return floats
