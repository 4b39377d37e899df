"""Photos from bytes: formats by content."""

import io

import pytest
from PIL import Image

from vlal_dist.data.format.images import HEAD_BYTES, OPENED, photo_format


@pytest.mark.parametrize("name", OPENED)
def test_formats_that_are_read_are_told_apart_by_content(name: str) -> None:
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
