"""Photos from bytes: formats by content, pixels, limits, metadata."""

import io
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.fixtures.odd_photos import (
    ALPHA,
    GREY,
    HIDDEN,
    RGB,
    OddPhoto,
    chunk,
    insert,
    odd_photos,
    picture,
    png,
    saved,
    segment,
)
from vlal_dist.data.format.images import (
    HEAD_BYTES,
    OPENED,
    encode_jpeg,
    open_photo,
    photo_format,
    photo_size,
    read_photo,
    upright_rgb,
)
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.errors import DataError

ODD = {one.name: one for one in odd_photos()}
LIMIT = 10_000_000


@pytest.mark.parametrize("name", OPENED)
def test_formats_that_are_read_are_known_by_content(name: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (9, 7)).save(sink, name)
    assert photo_format(sink.getvalue()[:HEAD_BYTES]) == name


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIC"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", None),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"8BPS\0\1", "PSD"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
        (b"BMW makes cars, and this is a text of more than eighteen letters", None),
        (b"BM", None),
        (b"", None),
        (b"<html>404</html>", None),
        (b"\xff\xd8", None),
    ],
)
def test_other_files_are_named_or_none(head: bytes, name: str | None) -> None:
    assert photo_format(head) == name
    assert name not in OPENED


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_a_photo_has_the_pixels_of_a_reference_or_is_rejected_with_its_reason(
    odd: OddPhoto,
) -> None:
    if odd.pixels is None:
        with pytest.raises(DataError, match=f"^{odd.reason}: "):
            read_photo(odd.data, max_pixels=LIMIT)
        return
    photo = read_photo(odd.data, max_pixels=LIMIT)
    found = np.asarray(photo.image).astype(int)
    assert found.shape == odd.pixels.shape
    assert np.abs(found - odd.pixels).max() <= odd.tolerance
    kept = read_photo(odd.data, max_pixels=LIMIT, keep_metadata=True)
    assert np.array_equal(np.asarray(kept.image), found)
    for jpeg in (photo.jpeg, kept.jpeg):
        if jpeg is not None:  # what pack stores
            assert np.array_equal(decode_jpeg(jpeg), found)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")), found)
    assert b"SECRET" not in encode_jpeg(photo.image, quality=95) + (photo.jpeg or b"")


def test_metadata_are_removed_without_touching_the_image() -> None:
    data = ODD["jpeg_private"].data
    assert all(word in data for word in (b"SERIAL", b"CAMERA", b"SECRET"))
    assert Image.open(io.BytesIO(data)).getexif().get_ifd(0x8825)[1] == "N"  # a position
    assert read_photo(data, max_pixels=LIMIT).jpeg == saved(RGB)  # which holds no metadata
    assert read_photo(data, max_pixels=LIMIT, keep_metadata=True).jpeg == data
    trailing = ODD["jpeg_trailing"].data
    assert read_photo(trailing, max_pixels=LIMIT).jpeg == saved(RGB)
    assert read_photo(trailing, max_pixels=LIMIT, keep_metadata=True).jpeg == trailing
    profile = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(99))
    thumbnail = segment(0xE0, b"JFXX\0\x10" + saved(RGB[:8, :8]))
    more = insert(saved(RGB), profile, thumbnail)
    assert read_photo(more, max_pixels=LIMIT).jpeg == saved(RGB)


def test_the_background_is_chosen() -> None:
    data = png(np.dstack([HIDDEN, ALPHA]), 6, 8)
    found = np.asarray(open_photo(data, max_pixels=LIMIT, background="#0a64c8")).astype(int)
    share = ALPHA[..., None] / 255
    expected = RGB * share + np.array([10, 100, 200]) * (1 - share)
    assert np.abs(found - expected).max() <= 1
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(upright_rgb(opened, background="#0a64c8")), found)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"])
def test_images_of_the_modes_of_pillow_are_converted(mode: str) -> None:
    steps = {"La": ("L", "LA", "La"), "LA": ("L", "LA"), "RGBa": ("RGBA", "RGBa")}
    image = Image.fromarray(RGB)
    for step in {**steps, "PA": ("P", "PA")}.get(mode, (mode,)):
        image = image.convert(step)
    expected = np.repeat(np.asarray(Image.fromarray(RGB).convert("L"))[..., None], 3, axis=2)
    expected = expected if mode[0] == "L" else RGB
    found = np.asarray(upright_rgb(image)).astype(int)
    assert np.abs(found - expected).mean() <= (20 if mode[0] == "P" else 0)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_other_colour_spaces_of_pillow_are_converted(mode: str) -> None:
    found = np.asarray(upright_rgb(Image.fromarray(RGB).convert(mode))).astype(int)
    assert np.abs(found - RGB).max() <= 8  # the way there is rounded, too


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match=r"^unsupported: grey .* without a declared range"):
        upright_rgb(Image.fromarray(GREY).convert(mode))


def test_an_eps_named_jpg_starts_no_process(tmp_path: Path) -> None:
    """Pillow would run Ghostscriptwithout a list of formats: a stand-in lies ready."""
    started, ghostscript, photo = (tmp_path / name for name in ("started", "gs", "evil.jpg"))
    ghostscript.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    ghostscript.chmod(0o755)
    photo.write_bytes(ODD["eps"].data)
    code = """
import sys
from PIL import Image
from vlal_dist.data.format.images import open_photo
data = open(sys.argv[1], "rb").read()
try:
    open_photo(data, max_pixels=10**7)
except Exception as error:
    print(error)
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(script: str) -> str:
        command = [sys.executable, "-c", script, str(photo)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        ).stdout

    assert "not an image: EPS is not read; convert it to JPEG or PNG" in run(code)
    assert not started.exists()
    run("import sys; from PIL import Image; Image.open(sys.argv[1]).load()")
    assert started.exists()  # so this test would have seen it


def test_bombs_take_little_memory() -> None:
    """ICO around a PNG, PNG text, TIFF tiles, canvases, JPEG headers: megabytes, not gigabytes."""
    inner = png(np.zeros((1, 7500), np.uint8), 2, 8, size=(20_000, 20_000))
    ico = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000))) * 100
    whole = saved(RGB)
    sof = whole.find(b"\xff\xc0")
    huge = whole[: sof + 5] + struct.pack(">HH", 65_000, 65_000) + whole[sof + 9 :]
    names = ("png_text_bomb", "png_huge", "tiff_huge_tile", "tiff_huge", "webp_huge", "bmp_huge")
    files = [ico, png(RGB, 2, 8, text), huge, *(ODD[name].data for name in names)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in files:
        with pytest.raises(DataError):
            open_photo(data, max_pixels=LIMIT)
    with pytest.raises(DataError, match="cannot be decoded: too large: 65000x65000 pixels"):
        decode_jpeg(huge)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


def test_a_foreign_crop_with_endless_scans_is_refused_at_once() -> None:
    big = saved(np.tile(picture(), (20, 20, 1)), progressive=True)
    scan = big[big.rfind(b"\xff\xda") : -2]
    with pytest.raises(DataError, match="more than 500 scans"):
        decode_jpeg(big[:-2] + scan * 600 + b"\xff\xd9")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_jpeg_is_refused_or_decoded_strictly(data: st.DataObject) -> None:
    """Cut, flipped and removed bytes: what is stored is what every stage can read."""
    jpg = whole = saved(RGB, progressive=data.draw(st.booleans()), restart_marker_rows=1)
    at = data.draw(st.integers(0, len(jpg) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "remove", "cut with end"]))
    if kind == "flip":
        bit = 1 << data.draw(st.integers(0, 7))
        jpg = jpg[:at] + bytes([jpg[at] ^ bit]) + jpg[at + 1 :]
    elif kind == "remove":
        jpg = jpg[:at] + jpg[at + data.draw(st.integers(1, 40)) :]
    else:
        jpg = jpg[:at] + (b"\xff\xd9" if kind == "cut with end" else b"")
    try:
        photo = read_photo(jpg, max_pixels=LIMIT)
    except DataError:
        return
    if photo.jpeg is not None:
        stored = simplejpeg.decode_jpeg(photo.jpeg, "RGB")
        assert np.array_equal(stored, np.asarray(photo.image))
        try:
            lenient = simplejpeg.decode_jpeg(jpg, "RGB", strict=False)
        except ValueError:  # its header is read strictly all the same
            lenient = simplejpeg.decode_jpeg(whole, "RGB")
        assert np.array_equal(stored, lenient)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_of_the_upright_photo(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, format=kind, exif=exif)
    data = buffer.getvalue()
    assert photo_size(data, max_pixels=10**6) == open_photo(data, max_pixels=10**6).size


def test_size_of_a_jpeg_without_its_pixels() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 90).save(buffer, format="JPEG", quality=95)
    assert photo_size(buffer.getvalue()[:-80], max_pixels=10**6) == (40, 30)
    for data in (b"\xff\xd8\xff\xe0", b"", b"text"):
        with pytest.raises(DataError):
            photo_size(data, max_pixels=10**6)
