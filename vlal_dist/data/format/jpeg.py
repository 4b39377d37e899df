"""JPEG files: the strict decoder of every stage, and lossless repair of photos.

libjpeg decodes damaged files with a warning and fills what is lost with grey. simplejpeg
(libjpeg-turbo) is asked to refuse them, and decides both what pack stores and what later stages
read. Sources: ITU T.81 (JPEG), T.871 (JFIF), T.872 (Adobe's APP14).
"""

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from vlal_dist.errors import DataError

Pixels = npt.NDArray[np.uint8]

CROP_PIXELS = 64_000_000
"""Most pixels of a stored crop, 192 MB decoded; a larger one is refused by its header."""
MAX_SCANS = 500
"""Most scans of a file: each costs a pass over all blocks, however few bytes it has. Encoders
write 1 to 12."""

_EOI, _SOS, _DHT, _DAC, _DRI, _DQT = 0xD9, 0xDA, 0xC4, 0xCC, 0xDD, 0xDB
_APP0, _APP1, _APP14, _APP15, _COM = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, _DAC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_HUFFMAN = frozenset({0xC0, 0xC1, 0xC2})
_SUBSAMPLINGS = frozenset({"444", "422", "420", "440", "411", "Gray"})
_PERIOD = 8
"""Longest pattern, in bytes, whose repetition counts as padding."""

_MARKER = re.compile(rb"\xff+([\x01-\xfe])")
_SCAN_END = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")
_SCAN = re.compile(rb"\xff\xda")
_EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_UNSUPPORTED = re.compile("Unsupported (JPEG|color)|.*subsampling")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_segment = struct.Struct(">BBH").unpack_from
_size = struct.Struct(">HH").unpack_from


def decode_jpeg(jpg: bytes | memoryview, *, max_pixels: int = CROP_PIXELS) -> Pixels:
    """Decode a whole JPEG with libjpeg-turbo; every warning of the library is an error.

    Args:
        jpg: a file.
        max_pixels: checked on the header, before memory is taken.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        DataError: no whole JPEG, damaged, or larger than `max_pixels`.
    """
    try:
        _check_cost(jpg, max_pixels)
        pixels: Pixels = simplejpeg.decode_jpeg(jpg, "RGB")
    except (ValueError, KeyError) as error:  # KeyError: a colour space that libjpeg lacks
        raise DataError(f"a crop cannot be decoded: {error}") from None
    return pixels


def check_jpeg(jpg: bytes | memoryview, *, max_pixels: int = CROP_PIXELS) -> None:
    """Check a file's header before another decoder reads it; raises as `decode_jpeg`."""
    try:
        _check_cost(jpg, max_pixels)
    except ValueError as error:
        raise DataError(f"a crop cannot be decoded: {error}") from None


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """DataError when a photo's header states more pixels than the limit, or none."""
    if width < 1 or height < 1:
        raise DataError(f"truncated or damaged: an image of {width}x{height} pixels")
    if width * height > max_pixels:
        raise DataError(
            f"too large: {width}x{height} pixels, limit {max_pixels}; "
            "raise max_pixels (of pack, of predict) if the photo is meant"
        )


def _check_cost(jpg: bytes | memoryview, max_pixels: int) -> None:
    """ValueError when decoding would take too much memory or time, by header and scans."""
    height, width = _frame_size(jpg)
    if height * width > max_pixels:
        raise ValueError(f"too large: {width}x{height} pixels, limit {max_pixels}")
    # The search takes longer than a small file is worth.
    if height * width * len(jpg) > 10**11 and len(_SCAN.findall(jpg)) > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")


def _frame_size(jpg: bytes | memoryview) -> tuple[int, int]:
    """Height and width, read in half a microsecond; unusual headers by simplejpeg."""
    at = 2
    try:
        while True:
            fill, marker, length = _segment(jpg, at)
            if marker in _FRAMES and fill == 0xFF:
                height, width = _size(jpg, at + 5)
                return height, width
            if fill != 0xFF or marker < 0xC0 or 0xD0 <= marker <= _SOS:
                break
            at += 2 + length
    except struct.error:
        pass
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpg, strict=False)
    except KeyError:  # a damaged frame header: simplejpeg looks up what libjpeg does not know
        raise ValueError("unknown colour sampling in its header") from None
    return int(height), int(width)


@dataclass(frozen=True)
class JpegPhoto:
    """A photo's JPEG, decoded.

    Attributes:
        pixels: uint8 [H, W, 3], RGB, not turned.
        orientation: EXIF's, 1 to 8; 1 is upright.
        stored: bytes that every stage decodes to `pixels`, without metadata; None where a crop
            must be compressed again: CMYK, RGB without conversion to YCbCr, arithmetic coding.
    """

    pixels: Pixels
    orientation: int
    stored: bytes | None


def read_jpeg(data: bytes, *, max_pixels: int, keep_metadata: bool = False) -> JpegPhoto:
    """Decode a photo's JPEG strictly; what provably is no part of the image is repaired.

    Repaired, without touching a coefficient: bytes behind segments of metadata, wrong spectral
    parameters of sequential scans, unknown versions and colour transforms in JFIF and Adobe
    segments, a missing end marker after complete data, and padding before the end marker.

    Args:
        data: the file.
        max_pixels: checked on the header.
        keep_metadata: leave EXIF, XMP, comments, ICC profiles, and what follows the image in
            `stored`.

    Raises:
        DataError: too large, truncated or damaged, or unsupported (12 bits, lossless, ...).
    """
    try:
        parts = _Parts(data, keep_metadata=keep_metadata)
        parts.check_complete()
        jpg = parts.join()
        height, width = _frame_size(jpg)
        check_pixels(width, height, max_pixels)
        jpg, pixels = _decode_repaired(jpg, parts.components)
        if keep_metadata:
            jpg += data[parts.end :]
        usual = _is_usual(jpg)
    except DataError:
        raise
    except (ValueError, LookupError, struct.error) as error:
        if _UNSUPPORTED.match(str(error)):
            raise DataError(
                f"unsupported: a JPEG of a kind that is not read ({error}); save it as PNG or JPEG"
            ) from None
        raise DataError(f"truncated or damaged: {error}") from None
    kept = parts.frame in _HUFFMAN and usual
    return JpegPhoto(pixels, parts.orientation(), jpg if kept else None)


def read_jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height of a photo's JPEG when it is turned upright; no pixel is decoded.

    Raises:
        DataError: `truncated or damaged: ...`.
    """
    try:
        height, width = _frame_size(data)
        turned = _Parts(data, keep_metadata=False).orientation() >= 5
    except DataError:
        raise
    except (ValueError, LookupError, struct.error) as error:
        raise DataError(f"truncated or damaged: {error}") from None
    return (height, width) if turned else (width, height)


def upright_size(jpg: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Width and height of a file that every stage can read as it is: nothing repaired or turned.

    Raises:
        DataError: `too large: ...`, `truncated or damaged: ...`, `turned: ...` by EXIF, or
            `unsupported: ...` (inks, arithmetic coding, RGB without conversion to YCbCr).
    """
    try:
        parts = _Parts(jpg, keep_metadata=True)
        parts.check_complete()
        height, width = _frame_size(jpg)
        check_pixels(width, height, max_pixels)
        _decode(jpg, parts.components)
        usual = parts.frame in _HUFFMAN and parts.components != 4 and _is_usual(jpg)
        orientation = parts.orientation()
    except DataError:
        raise
    except (ValueError, LookupError, struct.error) as error:
        raise DataError(f"truncated or damaged: {error}") from None
    if orientation != 1:
        raise DataError(f"turned: its EXIF orientation is {orientation}")
    if not usual:
        raise DataError("unsupported: a JPEG of a kind that is not read as it is")
    return width, height


def _is_usual(jpg: bytes) -> bool:
    """Whether colours and subsampling are such that decoders on GPUs read them, too."""
    try:
        _, _, colours, subsampling = simplejpeg.decode_jpeg_header(jpg)
    except KeyError:  # a subsampling without a name
        return False
    return colours in ("YCbCr", "Gray") and subsampling in _SUBSAMPLINGS


def check_fragments(fragments: Iterable[bytes], tables: bytes) -> None:
    """Decode the JPEGs inside a TIFF strictly, which libtiff does not.

    Args:
        fragments: its strips or tiles.
        tables: tag JPEGTables, which they share; empty: none.

    Raises:
        DataError: one of them is damaged.
    """
    for fragment in fragments:
        try:
            parts = _Parts(tables[:-2] + fragment[2:] if tables else fragment, keep_metadata=True)
            parts.check_complete()
            _decode(parts.join(), parts.components)
        except (ValueError, LookupError, struct.error) as error:
            raise DataError(f"truncated or damaged: {error}") from None


def _decode_repaired(jpg: bytes, components: int) -> tuple[bytes, Pixels]:
    """Decode strictly; padding before the end marker is removed."""
    try:
        return jpg, _decode(jpg, components)
    except ValueError as error:
        # The library keeps only its last warning: the file without the padding is decoded strictly
        # again. A changed bit can end the data early, too; what is left over then has no pattern.
        found = _EXTRANEOUS.fullmatch(str(error))
        end = len(jpg) - 2
        extra = jpg[end - int(found[1]) : end] if found else b""
        if not _is_padding(extra):
            raise
        jpg = jpg[: end - len(extra)] + jpg[end:]
    return jpg, _decode(jpg, components)


def _decode(jpg: bytes, components: int) -> Pixels:
    pixels: Pixels
    if components != 4:
        pixels = simplejpeg.decode_jpeg(jpg, "RGB")
        return pixels
    # Inks are stored inverted: 255 is none. (T.872; Pillow, ImageMagick and browsers agree.)
    inks = simplejpeg.decode_jpeg(jpg, "CMYK").astype(np.uint16)
    pixels = ((inks[..., :3] * inks[..., 3:] + 127) // 255).astype(np.uint8)
    return pixels


def _is_padding(extra: bytes) -> bool:
    """Whether bytes repeat one short pattern, which coded image data does not."""
    if not extra.strip(b"\0"):
        return bool(extra)
    return any(
        len(extra) >= max(8, 4 * period) and extra[period:] == extra[:-period]
        for period in range(1, _PERIOD + 1)
    )


class _Parts:
    """The segments of a file that say what its image is.

    Attributes:
        frame: marker of the frame, which names the coding process.
        components: 1 grey, 3 colours, 4 inks.
        end: position after the end marker.

    Raises:
        ValueError: segments are cut or unknown.
    """

    def __init__(self, data: bytes, *, keep_metadata: bool) -> None:
        self.frame, self.components, self.end = 0, 0, len(data)
        self._data, self._keep = data, keep_metadata
        self._parts: list[bytes] = [b"\xff\xd8"]
        self._adobe = 0
        self._exif, self._xmp = b"", b""
        self._missing: dict[int, list[int]] = {}
        self._scans = 0
        at, metadata = 2, True
        while found := _MARKER.search(data, at):
            if found.start() > at and not metadata:
                # Tables that have lost a byte would end too early, and decode to other pixels.
                raise ValueError(f"{found.start() - at} bytes between segments")
            marker, at = found[1][0], found.end()
            metadata = _APP0 <= marker <= _APP15 or marker == _COM
            if marker == _EOI:
                self.end = at
                break
            if marker == 0x01 or 0xD0 <= marker <= 0xD7:
                continue  # markers without content, ignored outside of a scan
            length = int.from_bytes(data[at : at + 2], "big")
            if length < 2 or at + length > len(data):
                raise ValueError(f"segment 0x{marker:02x} is cut")
            payload, at = data[at + 2 : at + length], at + length
            self._add(marker, payload)
            if marker == _SOS:
                stop = _SCAN_END.search(data, at)
                until = stop.start() if stop else len(data)
                self._parts.append(data[at:until] if stop else data[at:].rstrip(b"\xff"))
                at = until

    def join(self) -> bytes:
        """The bytes of these segments, and an end marker."""
        if self._adobe and self._parts[self._adobe][15] > 2:
            # An unknown colour transform: libjpeg warns, and takes the usual one.
            usual = bytes((2 if self.components == 4 else 1,))
            adobe = self._parts[self._adobe]
            self._parts[self._adobe] = adobe[:15] + usual + adobe[16:]
        return b"".join([*self._parts, b"\xff\xd9"])

    def check_complete(self) -> None:
        """ValueError when a scan that the image needs is not there."""
        if not self._scans:
            raise ValueError("no image data")
        if self._scans > MAX_SCANS:
            raise ValueError(f"more than {MAX_SCANS} scans")
        if any(any(left) for left in self._missing.values()):
            raise ValueError("the last scans are missing")

    def orientation(self) -> int:
        """EXIF's orientation, else XMP's, else 1.

        Raises:
            DataError: the EXIF block is damaged.
        """
        exif = Image.Exif()
        try:
            if self._exif:
                exif.load(self._exif)
            value = exif.get(0x0112)
        except Exception as error:  # whatever Pillow raises on a stranger's bytes
            raise DataError(f"truncated or damaged: EXIF: {error}") from None
        if value is None and (found := _XMP_ORIENTATION.search(self._xmp)):
            value = int(found[1])
        return value if isinstance(value, int) and 1 <= value <= 8 else 1

    def _add(self, marker: int, payload: bytes) -> None:
        if marker in _FRAMES:
            self._begin_frame(marker, payload)
        elif marker == _SOS:
            payload = self._begin_scan(payload)
        elif marker == _APP0 and payload.startswith(b"JFIF\0"):
            payload = b"JFIF\0\1\2" + payload[7:] if payload[5] != 1 else payload
            if not self._keep:
                payload = payload[:12] + b"\0\0"  # the rest is a thumbnail
        elif marker == _APP14 and payload.startswith(b"Adobe"):
            if len(payload) < 12:
                return  # libjpeg ignores it
            payload, self._adobe = payload if self._keep else payload[:12], len(self._parts)
        elif _APP0 <= marker <= _APP15 or marker == _COM:
            if marker == _APP1 and payload.startswith(b"Exif\0\0"):
                self._exif = self._exif or payload
            elif marker == _APP1 and b"adobe.com/xap" in payload[:40]:
                self._xmp += payload
            if not self._keep:
                return
        elif marker not in (_DHT, _DAC, _DQT, _DRI):
            raise ValueError(f"unknown segment 0x{marker:02x}")
        head = struct.pack(">BBH", 0xFF, marker, len(payload) + 2)
        self._parts.append(head + payload)

    def _begin_frame(self, marker: int, payload: bytes) -> None:
        if self.frame:
            raise ValueError("two frames")
        self.frame, self.components = marker, payload[5]
        for at in range(6, 6 + 3 * payload[5], 3):
            # Bits still to come of each coefficient; "all" is any number above those of a scan.
            self._missing[payload[at]] = [99] * (64 if marker in _PROGRESSIVE else 1)

    def _begin_scan(self, payload: bytes) -> bytes:
        """Note what a scan brings; the parameters of a sequential one are fixed by the standard."""
        self._scans += 1
        names = payload[1 : 1 + 2 * payload[0] : 2]
        first, last, bits = payload[-3:]
        if self.frame not in _PROGRESSIVE:
            for name in names:
                self._missing[name] = [0]
            return payload[:-3] + bytes((0, 63, 0))
        for name in names:
            left = self._missing.get(name, [])
            left[first : last + 1] = [bits & 15] * len(left[first : last + 1])
        return payload
