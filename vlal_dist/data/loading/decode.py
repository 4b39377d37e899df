"""Decode JPEG crops to model inputs on the CPU or the GPU (nvJPEG), or crop them from a photo.

The reference is Pillow's decoder and its antialiased bilinear resize (torchvision's `Resize` of a
Pillow image): every value is within 1 of 255 of it, and equal without a resize.
docs/benchmarks/decode.md compares it with other decoders. `ImageCache` keeps decoded images.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vlal_dist.data.format.images import crop_bounds
from vlal_dist.data.format.jpeg import Pixels, check_jpeg, decode_jpeg
from vlal_dist.errors import DataError

_resize: Callable[..., torch.Tensor] = torch._C._nn._upsample_bilinear2d_aa


def decode_into(jpg: bytes | memoryview, out: Pixels) -> None:
    """Decode a JPEG, resize it to S x S (bilinear, antialiased) and write it into `out`.

    Most of the time is spent without the interpreter's lock.

    Args:
        jpg: a whole file, RGB or grey.
        out: uint8 [S, S, 3], contiguous.

    Raises:
        DataError: the bytes are no whole JPEG, or larger than any crop.
    """
    resize_into(decode_jpeg(jpg), out)


def resize_into(pixels: Pixels, out: Pixels) -> None:
    """Resize pixels to S x S (bilinear, antialiased), written into `out`.

    Args:
        pixels: uint8 [H, W, 3].
        out: uint8 [S, S, 3], contiguous.
    """
    if pixels.shape == out.shape:
        out[:] = pixels
        return
    # numpy permutes axes in a tenth of torch's time, which matters for small crops.
    planes = torch.from_numpy(pixels[None].transpose(0, 3, 1, 2))
    target = torch.from_numpy(out[None].transpose(0, 3, 1, 2))
    # What torch.nn.functional.interpolate(antialias=True) calls; only it can write into `out`.
    _resize(planes, out.shape[:2], False, None, out=target)


Box = tuple[float, float, float, float]


def square_into(
    image: Image.Image, box: Box | None, out: Pixels, *, expansion: float, max_pixels: int
) -> None:
    """Crop a photo as pack does, and resize the crop.

    pack stores crops as JPEGs of quality 95, which this skips. It stores a whole photo that is an
    upright JPEG as it is, so for that nothing differs.

    Args:
        image: upright RGB (`open_photo`).
        box: x, y, width, height in pixels of it; None: all of it.
        out: uint8 [S, S, 3], contiguous; written.
        expansion: as in `crop_bounds`.
        max_pixels: of the crop, which may be larger than the photo.

    Raises:
        DataError: the box has no size, lies wholly outside the photo, or is too large.
    """
    if box is not None:
        left, top, right, bottom = crop_bounds(
            box, width=image.width, height=image.height, expansion=expansion
        )
        if (right - left) * (bottom - top) > max_pixels:
            raise DataError(
                f"box too large: a crop of {right - left}x{bottom - top} pixels, limit {max_pixels}"
            )
        image = image.crop((left, top, right, bottom))
    resize_into(np.array(image), out)  # a copy: torch warns of memory that it must not write


def decode_on(jpgs: Sequence[bytes], *, side: int, device: torch.device) -> Tensor:
    """Decode and resize (bilinear, antialiased) on a device.

    Close to `decode_into`, not equal to it: nvJPEG's colours and rounding differ from
    libjpeg-turbo's, and the resize is done in float32.

    Args:
        jpgs: whole files, at least one.
        side: S, pixels.
        device: of the result.

    Returns:
        float32 [B, 3, S, S], 0 to 255.

    Raises:
        DataError: one of them is no whole JPEG, or larger than any crop.
    """
    # Imported where it is used: torchvision takes as long to import as torch does.
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as decode_on_device

    for jpg in jpgs:
        check_jpeg(jpg)
    files = [torch.frombuffer(bytearray(jpg), dtype=torch.uint8) for jpg in jpgs]
    try:
        images = decode_on_device(files, mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        raise DataError(f"a crop cannot be decoded on {device}: {error}") from None
    squares = [
        functional.interpolate(one[None].float(), (side, side), mode="bilinear", antialias=True)
        for one in images
    ]
    return torch.cat(squares)


class ImageCache:
    """Decoded images by row of a corpus, uint8 [S, S, 3], kept from their first use up to a limit.

    Nothing is evicted: an epoch visits all rows once, so the least recently used image is the next
    one needed. May be shared by threads.

    Args:
        side: S, pixels.
        num_rows: of the corpus.
        limit_bytes: of all kept pixels; 0 keeps none. Memory is taken as images come.
    """

    def __init__(self, *, side: int, num_rows: int, limit_bytes: int) -> None:
        places = min(num_rows, limit_bytes // (side * side * 3))
        self._pixels = np.empty((places, side, side, 3), dtype=np.uint8)
        self._place: dict[int, int] = {}
        self._lock, self._next = threading.Lock(), 0

    def __len__(self) -> int:
        return len(self._place)

    def get(self, row: int) -> Pixels | None:
        """The pixels of a row, to be read only; None where they are not kept."""
        place = self._place.get(row)
        return None if place is None else self._pixels[place]

    def keep(self, row: int, pixels: Pixels) -> None:
        """Copy the pixels of a row, if there is room."""
        with self._lock:
            place = self._next
            if place == len(self._pixels) or row in self._place:
                return
            self._next += 1
        self._pixels[place] = pixels
        self._place[row] = place  # only now, when it is complete
