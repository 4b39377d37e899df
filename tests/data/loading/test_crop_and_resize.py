"""Squares of pixels: those of training for a whole JPEG, and boxes as pack crops them."""

import io

import numpy as np
import pytest
from PIL import Image

from vlal_dist.data.format.images import open_photo
from vlal_dist.data.loading.decode import Box, decode_into, square_into
from vlal_dist.errors import DataError

LIMIT = 10**6


def photo(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC).convert(mode)


def square(image: Image.Image, box: Box | None, expansion: float = 0.0) -> np.ndarray:
    out = np.zeros((64, 64, 3), np.uint8)
    square_into(image, box, out, expansion=expansion, max_pixels=LIMIT)
    return out


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_whole_jpeg_gives_the_pixels_of_training(mode: str) -> None:
    sink = io.BytesIO()
    photo(mode).save(sink, "JPEG", quality=80)
    expected = np.zeros((64, 64, 3), np.uint8)
    decode_into(sink.getvalue(), expected)
    opened = open_photo(sink.getvalue(), max_pixels=LIMIT)
    assert np.array_equal(square(opened, None), expected)
    assert np.array_equal(square(opened, (0, 0, 160, 120)), expected)


def test_boxes_are_cut_as_pack_cuts_them() -> None:
    image = photo()
    assert np.array_equal(square(image, (10.9, 20.2, 64, 64)), np.array(image)[20:84, 10:74])
    outside = square(image, (-32, 0, 64, 64))
    assert not outside[:, :32].any() and np.array_equal(outside[:, 32:], np.array(image)[:64, :32])
    margin = square(image, (40, 40, 32, 32), 2.0)
    assert np.array_equal(margin, square(image, (8, 8, 96, 96)))


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((5, 5, 0.2, 9), "zero size"),
        ((160, 0, 9, 9), "box outside"),
        ((0, 0, 1e9, 9), "box too large"),
        ((0, 0, float("nan"), 9), "box too large"),
    ],
)
def test_impossible_boxes_are_errors(box: Box, reason: str) -> None:
    with pytest.raises(DataError, match=f"^{reason}: "):
        square(photo(), box)
