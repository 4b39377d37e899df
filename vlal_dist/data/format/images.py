"""Photos from strangers: the only place that opens image files.

A format is known by its content, so that no decoder runs that is not named here, and sizes are
checked on the header before any pixel is decoded. What cannot be decoded whole and with a defined
brightness raises with the reason; nothing is decoded in part.
"""

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from vlal_dist.data.format.jpeg import (
    CROP_PIXELS,
    check_fragments,
    check_pixels,
    read_jpeg,
    read_jpeg_size,
)
from vlal_dist.errors import DataError

# The limit is set per call; Pillow's global one would only warn.
Image.MAX_IMAGE_PIXELS = None

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

WHITE = "#ffffff"
"""Colour below transparent pixels where none is given, or was recorded."""

OPENED = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats of `photo_format` that `open_photo` reads."""
HEAD_BYTES = 64
"""How many of a file's first bytes `photo_format` looks at."""

JPEG_SIDE = 65_500  # pixels; the encoder's limit

MAX_RATIO = 500
"""Longest side of a crop by its shortest. CLIP's preprocessing brings the shortest to the model's
input size before it cuts: one of 1x65500 would take 10 GB."""

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
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the image upright."""
_SUBFILE, _BITS, _PHOTOMETRIC, _COLOUR_MAP, _TILE_WIDTH, _TILE_HEIGHT = 254, 258, 262, 320, 322, 323
_COMPRESSION, _JPEG_TABLES = 259, 347
_SAMPLE_FORMAT, _MINIMUM, _MAXIMUM, _DNG_VERSION = 339, 340, 341, 50706
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


@dataclass(frozen=True)
class Photo:
    """A decoded photo.

    Attributes:
        image: RGB, upright, without transparency.
        jpeg: bytes that every stage decodes to `image` exactly, without metadata; None where there
            are none (other formats, turned photos, inks).
    """

    image: Image.Image
    jpeg: bytes | None


def open_photo(data: bytes, *, max_pixels: int, background: str = WHITE) -> Image.Image:
    """`read_photo`'s image."""
    return read_photo(data, max_pixels=max_pixels, background=background).image


def read_photo(
    data: bytes, *, max_pixels: int, background: str = WHITE, keep_metadata: bool = False
) -> Photo:
    """Decode a whole photo of one of the formats `OPENED`, known by content.

    Of animations and files of several pages the first image is taken. The size is checked on the
    header, before a pixel is decoded.

    Args:
        data: the file.
        max_pixels: limit of width times height.
        background: colour below transparent pixels, `#rrggbb`.
        keep_metadata: leave EXIF, comments and what follows the image in `Photo.jpeg`.

    Raises:
        DataError: `not an image: ...`, `too large: ...`, `truncated or damaged: ...`, or
            `unsupported: ...` where pixel values have no defined brightness.
    """
    name = photo_format(data[:HEAD_BYTES])
    if name == "JPEG":
        photo = read_jpeg(data, max_pixels=max_pixels, keep_metadata=keep_metadata)
        upright = photo.orientation == 1
        image = _turned(Image.fromarray(photo.pixels), photo.orientation)
        return Photo(image, photo.stored if upright else None)
    if name not in OPENED:
        if not data:
            raise DataError("not an image: the file is empty")
        if name is None:
            raise DataError(f"not an image: it begins as no {', '.join(OPENED)} file does")
        raise DataError(f"not an image: {name} is not read; convert it to JPEG or PNG")
    return Photo(_open_with_pillow(data, name, max_pixels, background), None)


def photo_size(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Width and height of the upright photo: of a JPEG from its header, of others decoded.

    Raises:
        DataError: as `read_photo`.
    """
    if photo_format(data[:HEAD_BYTES]) == "JPEG":
        return read_jpeg_size(data)
    return open_photo(data, max_pixels=max_pixels).size


def upright_rgb(image: Image.Image, *, background: str = WHITE) -> Image.Image:
    """The image as RGB, on a background, turned by its EXIF orientation.

    Raises:
        DataError: its pixel values have no defined brightness.
    """
    orientation = image.getexif().get(0x0112, 1)
    return _turned(_to_rgb(image, background), orientation)


def _open_with_pillow(data: bytes, name: str, max_pixels: int, background: str) -> Image.Image:
    if name == "WEBP":  # Pillow takes memory for the canvas when it opens the file
        check_pixels(*_webp_size(data), max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF or palette warnings say nothing of pixels
            file = _without_profile(data) if name == "PNG" else data
            image: Image.Image = Image.open(io.BytesIO(file), formats=(name,))
            check_pixels(image.width, image.height, max_pixels)
            if name == "TIFF":
                _check_tiff(image, max_pixels)
                _check_jpeg_inside(image, data)
            image.load()
            if name == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
                image = image.convert("RGB")  # many writers leave the alpha of a BMP at 0
            if name == "PNG" and "transparency" in image.info:
                _scale_key(image, depth=data[24])
            upright = upright_rgb(image, background=background)
            upright.info.clear()  # comments, which Pillow would write into crops
            return upright
    except UnidentifiedImageError:
        raise DataError(
            f"truncated or damaged: a {name} whose header is damaged or of a kind that is not "
            "read; save it as JPEG or PNG"
        ) from None
    except DataError:
        raise
    except Exception as error:  # Pillow raises any type on damaged files
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"truncated or damaged: {why}") from None


def _without_profile(data: bytes) -> bytes:
    """A PNG without its colour profile, which is not applied, but unpacked by Pillow."""
    at = len(b"\x89PNG\r\n\x1a\n")
    while (name := data[at + 4 : at + 8]) and name != b"IDAT":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if name == b"iCCP":
            return data[:at] + data[end:]
        at = end
    return data


def _check_jpeg_inside(image: Image.Image, data: bytes) -> None:
    """DataError where a TIFF's strips or tiles are damaged JPEGs, of which libtiff only warns."""
    tags = _tags(image)
    compression = tags.get(_COMPRESSION)
    if compression == 6:
        raise DataError("unsupported: a TIFF of the old JPEG compression; save it as JPEG or PNG")
    if compression == 7:
        places = (324, 325) if _TILE_WIDTH in tags else (273, 279)
        starts, lengths = (tags[tag] for tag in places)
        fragments = (data[at : at + n] for at, n in zip(starts, lengths, strict=True))
        check_fragments(fragments, tags.get(_JPEG_TABLES, b""))


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas (RFC 9649)."""
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    return width, height


def _check_tiff(image: Image.Image, max_pixels: int) -> None:
    """DataError where the first image is not the photo, tiles are too large, or bytes signed."""
    tags = _tags(image)
    if _DNG_VERSION in tags:
        raise DataError("not an image: a camera's raw file is not read; convert it to JPEG or PNG")
    if tags.get(_SUBFILE, 0) & 1:
        raise DataError("unsupported: the first page is a thumbnail; save the photo as JPEG or PNG")
    if _TILE_WIDTH in tags and _TILE_HEIGHT in tags:
        check_pixels(tags[_TILE_WIDTH], tags[_TILE_HEIGHT], max_pixels)
    if image.mode == "L" and _first(tags.get(_SAMPLE_FORMAT, 1)) == 2:
        raise DataError("unsupported: signed bytes; save it as JPEG or PNG")
    if image.mode == "P" and max(tags[_COLOUR_MAP]) < 256:
        # Meant are 16 bits; some programs write 8, of which Pillow would make black.
        planes = np.asarray(tags[_COLOUR_MAP], dtype=np.uint8).reshape(3, -1)
        image.load()
        image.putpalette(planes.T.tobytes(), "RGB")


def _scale_key(image: Image.Image, *, depth: int) -> None:
    """Bring a PNG's transparent colour to the 8 bits that its pixels were brought to."""
    if image.mode == "L" and depth < 8:
        image.info["transparency"] *= 255 // ((1 << depth) - 1)
    elif image.mode == "RGB" and depth == 16:
        raise DataError(
            "unsupported: 16-bit colours of which one is transparent; save it with an alpha channel"
        )


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned upright; values that EXIF does not define leave it as it is."""
    method = _TURNS.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    """The image as 8-bit RGB: deep pixels scaled, transparent ones on the background."""
    key = image.info.get("transparency")
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    if deep or (image.mode in ("1", "L", "RGB") and key is not None):
        rgb = (_scaled(image) if deep else image).convert("RGB")
        if key is None:
            return rgb
        clear = np.asarray(image) == (bool(key) if image.mode == "1" else np.asarray(key))
        clear = clear.all(axis=-1) if clear.ndim == 3 else clear
        alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(
            image, lab, srgb, outputMode="RGB", flags=ImageCms.Flags.NOOPTIMIZE
        )
        assert converted is not None  # None only where it works in place
        return converted
    elif image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    else:
        return image.convert("RGB")
    canvas = Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits scaled to 8: 16 bits by their range, others by the declared one."""
    tags, values = _tags(image), np.asarray(image)
    # Pillow 11 opens a PNG of 16 bits as "I"; other integers without tags have no known range.
    bits = _first(tags.get(_BITS, 32 if image.mode == "I" and image.format != "PNG" else 16))
    if bits <= 16 and _first(tags.get(_SAMPLE_FORMAT, 1)) == 1 and image.mode != "F":
        brightness = np.arange(1 << 16) * 255 / (2**bits - 1) + 0.5
        table = np.clip(brightness, 0, 255).astype(np.uint8)
        grey = table[values]
        return Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey)
    if _MINIMUM in tags and _MAXIMUM in tags:
        low, high = float(_first(tags[_MINIMUM])), float(_first(tags[_MAXIMUM]))
        unsigned = image.mode == "I" and _first(tags.get(_SAMPLE_FORMAT, 1)) == 1
        values = values.view(np.uint32) if unsigned else values
    else:
        kind = "floats" if image.mode == "F" else f"{bits}-bit integers"
        raise DataError(
            f"unsupported: grey {kind} without a declared range (TIFF's SMinSampleValue and "
            "SMaxSampleValue); save it with 8 or 16 bits"
        )
    if not low < high or np.isnan(values).any():
        raise DataError(f"unsupported: a range of {low:g} to {high:g}, or pixels without a value")
    share = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    if tags.get(_PHOTOMETRIC) == 0:
        share = 1 - share  # white is zero
    return Image.fromarray((share * 255 + 0.5).astype(np.uint8))


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """A TIFF's tags by number."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def _first(value: Any) -> Any:
    """The first of a tag's values, which Pillow gives bare or as a tuple."""
    return value[0] if isinstance(value, tuple) else value


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


def check_crop_size(width: int, height: int, *, max_pixels: int) -> None:
    """Raise a DataError where a crop of this size cannot be stored, or not be scored."""
    limit = min(max_pixels, CROP_PIXELS)
    if max(width, height) > JPEG_SIDE or width * height > limit:
        raise DataError(
            f"box too large: a crop of {width}x{height} pixels; allowed are {limit} pixels (the "
            f"lower of pack.max_pixels and {CROP_PIXELS}) and {JPEG_SIDE} on a side"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(
            f"box too narrow: a crop of {width}x{height} pixels; one side may be at most "
            f"{MAX_RATIO} times the other"
        )


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """JPEG bytes, 4:4:4, without metadata."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality, subsampling=0)
    return sink.getvalue()
