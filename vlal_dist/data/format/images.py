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


OPENED = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats of `photo_format` that `open_photo` reads."""
HEAD_BYTES = 64
"""How many of a file's first bytes `photo_format` looks at."""

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II\x2a\0\x10\0\0\0CR", "CR2"),
    (b"II\x2a\0", "TIFF"),
    (b"MM\0\x2a", "TIFF"),
    (b"II\x2b\0", "TIFF"),
    (b"MM\0\x2b", "TIFF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\2\0", "ICO"),
    (b"8BPS", "PSD"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"<svg", "SVG"),
)
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1"), "HEIC"),
    b"msf1": "HEIC",
    b"crx ": "CR3",
}
"""Brand of an ISO media file (ISO/IEC 14496-12, 23008-12) -> format."""
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


def photo_format(head: bytes) -> str | None:
    """The image format of a file, by its first bytes; the file's name says nothing.

    Args:
        head: `HEAD_BYTES` bytes, or the whole of a shorter file.

    Returns:
        One of `OPENED`, or the name of a format that is known but not read ("HEIC", "AVIF", "EPS",
        "PDF", "ICO", "PSD", "JPEG2000", ...); None: no image that is known.
    """
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"  # two letters alone are also how a text may begin
    if head[4:8] == b"ftyp":
        # The major brand, the minor version (a number), then the compatible brands.
        brands = [head[8:12], *(head[at : at + 4] for at in range(16, len(head), 4))]
        known = {_BRANDS[brand] for brand in brands if brand in _BRANDS}
        return next((name for name in ("AVIF", "CR3", "HEIC") if name in known), None)
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


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
