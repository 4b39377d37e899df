"""JPEGs decoded by the accelerator (nvJPEG, through torchvision), where the CPUs cannot keep up."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vlal_dist.errors import DataError


def decode_on(jpgs: Sequence[bytes], *, side: int, device: torch.device) -> Tensor:
    """Decode and squash (bilinear, antialiased) on a device.

    Close to `decode_into`, not equal to it: nvJPEG's colours and rounding differ from
    libjpeg-turbo's, and the resize is done in float32.

    Args:
        jpgs: whole files, at least one.
        side: S, pixels.
        device: where to.

    Returns:
        float32 [B, 3, S, S], 0 to 255.

    Raises:
        DataError: one of them is no whole JPEG.
    """
    # Imported where it is used: torchvision takes as long to import as torch does.
    from torchvision.io import ImageReadMode, decode_jpeg

    files = [torch.frombuffer(bytearray(jpg), dtype=torch.uint8) for jpg in jpgs]
    try:
        images = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        raise DataError(f"a crop cannot be decoded on {device}: {error}") from None
    squares = [
        functional.interpolate(one[None].float(), (side, side), mode="bilinear", antialias=True)
        for one in images
    ]
    return torch.cat(squares)
