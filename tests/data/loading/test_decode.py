"""Decoding is within one level of Pillow, and refuses incomplete files."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlal_dist.data.loading.batch import Batch, decoded, on_device
from vlal_dist.data.loading.decode import decode_into, decode_on
from vlal_dist.errors import DataError


def photo(width: int, height: int, *, mode: str = "RGB", seed: int = 0, quality: int = 90) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.convert(mode).save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def pillow(jpg: bytes, side: int) -> np.ndarray:
    image = Image.open(io.BytesIO(jpg)).convert("RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("width", "height", "side"), [(60, 80, 64), (500, 375, 224), (31, 7, 64), (900, 70, 96)]
)
def test_every_value_is_within_one_of_pillow(mode: str, width: int, height: int, side: int) -> None:
    for seed in range(3):
        jpg = photo(width, height, mode=mode, seed=seed)
        out = np.zeros((side, side, 3), np.uint8)
        decode_into(jpg, out)
        distance = np.abs(out.astype(int) - pillow(jpg, side))
        assert distance.max() <= 1 and distance.mean() < 0.25


def test_without_a_resize_the_pixels_are_pillows() -> None:
    jpg = photo(64, 64)
    out = np.zeros((64, 64, 3), np.uint8)
    decode_into(memoryview(b"x" + jpg)[1:], out)
    assert np.array_equal(out, np.asarray(Image.open(io.BytesIO(jpg))))


def test_only_its_own_slot_is_written() -> None:
    batch = np.full((3, 64, 64, 3), 7, np.uint8)
    decode_into(photo(60, 80), batch[1])
    assert (batch[0] == 7).all() and (batch[2] == 7).all() and (batch[1] != 7).any()


@pytest.mark.parametrize("damage", ["cut", "no image", "empty", "flipped"])
def test_a_damaged_jpeg_is_an_error(damage: str) -> None:
    jpg = photo(200, 200)
    broken = {
        "cut": jpg[: len(jpg) // 2],
        "no image": b"<html>not here</html>",
        "empty": b"",
        "flipped": jpg[:2] + b"\x00" + jpg[3:],
    }[damage]
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_into(broken, np.zeros((64, 64, 3), np.uint8))


def batch_of(image: torch.Tensor, flip: list[bool], *, normalize: bool) -> Batch:
    rows = torch.arange(len(image))
    return Batch(
        image=image,
        flip=torch.tensor(flip),
        object_id=rows,
        label=torch.zeros((len(image), 1), dtype=torch.int8),
        uid=rows,
        visit=rows,
        row=rows,
        row_weight=torch.ones(len(image)),
        weight_indptr=None,
        inverse_weight=None,
        normalize=normalize,
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_bytes_become_mirrored_floats(normalize: bool) -> None:
    image = torch.randint(0, 256, (4, 6, 6, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    kept = image.clone()
    batch = batch_of(image, [True, False, True, False], normalize=normalize)
    moved = on_device(batch, torch.device("cpu"))
    expected = image.numpy().astype(np.float32) * np.float32(1 / 255)
    if normalize:
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
        expected = (expected - mean) / std
    assert moved.image.is_contiguous(memory_format=torch.channels_last)
    assert moved.image.dtype == torch.float32
    for row, mirrored in enumerate(batch.flip.tolist()):
        shown = expected[row, :, :, ::-1] if mirrored else expected[row]
        assert np.array_equal(moved.image[row].numpy(), shown)
    assert torch.equal(batch.image, kept)
    assert on_device(moved, torch.device("cpu")).image is moved.image


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_a_device_decodes_close_to_the_cpu() -> None:
    jpgs = [photo(60, 80, seed=n) for n in range(3)]
    found = decode_on(jpgs, side=64, device=torch.device("cpu"))
    for jpg, one in zip(jpgs, found, strict=True):
        out = np.zeros((64, 64, 3), np.uint8)
        decode_into(jpg, out)
        assert np.abs(one.permute(1, 2, 0).numpy() - out).max() <= 1.01
    with pytest.raises(DataError, match="cannot be decoded: "):
        decode_on([jpgs[0][:100]], side=64, device=torch.device("cpu"))
    later = batch_of(torch.zeros((0, 3, 64, 64), dtype=torch.uint8), [], normalize=False)
    later = replace(later, flip=torch.tensor([True, False, False]), jpgs=jpgs)
    cpu = torch.device("cpu")
    ready = decoded(later, cpu)
    assert ready.jpgs is None and torch.equal(ready.image, found.round().to(torch.uint8))
    assert torch.equal(on_device(ready, cpu).image[0], (ready.image[0] * (1 / 255)).flip(-1))
    broken = replace(later, uid=torch.arange(3), jpgs=[*jpgs[:2], b"no image"])
    with pytest.raises(DataError, match="uid 0000000000000002"):
        decoded(broken, cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (nvJPEG)")
def test_a_gpu_decodes_close_to_the_cpu() -> None:
    jpgs = [photo(500, 375, seed=n) for n in range(3)]
    on_gpu = decode_on(jpgs, side=224, device=torch.device("cuda")).cpu()
    on_cpu = decode_on(jpgs, side=224, device=torch.device("cpu"))
    assert (on_gpu - on_cpu).abs().mean() < 2
