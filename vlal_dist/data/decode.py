"""From a JPEG to a square of pixels, at the speed of libjpeg-turbo.

The measure is Pillow's decoder and its antialiased bilinear resize (what torchvision's `Resize`
does with a Pillow image): every value is within 1 of 255 of it, and equal where nothing is resized.
The comparison with the other decoders is in docs/benchmarks/decode.md.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from vlal_dist.errors import DataError

Pixels = npt.NDArray[np.uint8]
_resize: Callable[..., torch.Tensor] = torch._C._nn._upsample_bilinear2d_aa


def decode_into(jpg: bytes | memoryview, out: Pixels) -> None:
    """Decode a JPEG, squash it to S x S (bilinear, antialiased) and write it into `out`.

    Most of the time is spent without the interpreter's lock.

    Args:
        jpg: a whole file, RGB or grey.
        out: uint8 [S, S, 3], contiguous.

    Raises:
        DataError: the bytes are no whole JPEG.
    """
    try:
        pixels = simplejpeg.decode_jpeg(jpg, "RGB")
    except ValueError as error:
        raise DataError(f"a crop cannot be decoded: {error}") from None
    resize_into(pixels, out)


def resize_into(pixels: Pixels, out: Pixels) -> None:
    """Squash pixels to S x S (bilinear, antialiased), written into `out`.

    Args:
        pixels: uint8 [H, W, 3].
        out: uint8 [S, S, 3], contiguous.
    """
    if pixels.shape == out.shape:
        out[:] = pixels
        return
    # numpy turns axes in a tenth of torch's time, which small crops feel.
    planes = torch.from_numpy(pixels[None].transpose(0, 3, 1, 2))
    target = torch.from_numpy(out[None].transpose(0, 3, 1, 2))
    # What torch.nn.functional.interpolate(antialias=True) calls; only it can write into `out`.
    _resize(planes, out.shape[:2], False, None, out=target)
