"""Decoding, cropping and encoding of images with Pillow, for tools and scoring.

Truncated files raise instead of being decoded in part, and the header is checked against a pixel
limit before any pixel is decoded.
"""

import io
import math
import struct
import warnings
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vlal_dist.errors import DataError

Pixels = npt.NDArray[np.uint8]

# The limit is set per call; Pillow's global one would only warn.
Image.MAX_IMAGE_PIXELS = None

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What Pillow raises on damaged files, EXIF blocks included, besides its own type.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)


def open_photo(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode a whole photo, as RGB, turned upright by its EXIF orientation.

    Raises:
        DataError: not an image, truncated, or larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF or palette warnings say nothing of pixels
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise DataError(
                    f"too large: {image.width}x{image.height} pixels, limit {max_pixels}; "
                    "raise max_pixels (of pack, of predict) if the photo is meant"
                )
            image.load()
            return upright_rgb(image)
    except UnidentifiedImageError:
        raise DataError("not an image") from None
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"truncated or damaged: {error}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, turned by its EXIF orientation."""
    return ImageOps.exif_transpose(image).convert("RGB")


def is_plain_jpeg(data: bytes) -> bool:
    """Whether the file is an RGB or grey JPEG that needs no turning, so that its bytes can stay.

    Raises:
        DataError: its EXIF block is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            turned = image.getexif().get(0x0112, 1) != 1
            return image.format == "JPEG" and image.mode in ("RGB", "L") and not turned
    except DAMAGE as error:
        raise DataError(f"truncated or damaged: {error}") from None


def crop_bounds(
    box: tuple[float, float, float, float], *, width: int, height: int, expansion: float
) -> tuple[int, int, int, int]:
    """The crop of a box: left, top, right, bottom in whole pixels (authors' training dataset).

    Each edge is truncated. Without expansion the crop may leave the image (zero-padded); with it,
    a margin of `expansion / 2` of the shorter side is added and the crop clipped to the image.

    Args:
        box: x, y, width, height in pixels.
        width: image width.
        height: image height.
        expansion: share of the shorter side added in all.

    Raises:
        DataError: the box has no size in whole pixels, or lies wholly outside the image.
    """
    x, y, w, h = box
    if not (math.isfinite(x + w) and math.isfinite(y + h)):
        raise DataError(f"box too large: coordinates overflow: {list(box)}")
    left, top, right, bottom = int(x), int(y), int(x + w), int(y + h)
    if right <= left or bottom <= top:
        raise DataError(f"zero size: box {list(box)} covers no whole pixel")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise DataError(f"box outside: {list(box)} in an image of {width}x{height}")
    if expansion > 0:
        margin = int(expansion / 2 * min(w, h))
        left, top = max(left - margin, 0), max(top - margin, 0)
        right, bottom = min(right + margin, width), min(bottom + margin, height)
    return left, top, right, bottom


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """JPEG bytes, 4:4:4, without metadata."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality, subsampling=0)
    return sink.getvalue()


def decode_rgb(jpg: bytes) -> Pixels:
    """Decode a shard's JPEG to uint8 [H, W, 3].

    Raises:
        DataError: the bytes are no whole JPEG.
    """
    try:
        image = Image.open(io.BytesIO(jpg))
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"a crop cannot be decoded: {error}") from None
