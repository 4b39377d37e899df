"""JPEG decoders on one core: speed, and distance from Pillow's own decoder and resize.

    make peers                                  # OpenCV lies in that environment
    PYTHONPATH=. .peers/bin/python -m benchmarks.decode.decode [--quick] [--markdown FILE]

Each decoder turns the same made-up JPEGs into uint8 squares; CPU seconds, the decoders in turn
within each of the rounds, the least over rounds.
"""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torchvision
from PIL import Image

from benchmarks.common.data import CROPS, PHOTOS, photo
from benchmarks.common.harness import finish, in_rounds, make_parser, table
from vlal_dist.data.loading.decode import decode_into

Pixels = npt.NDArray[np.uint8]
Decode = Callable[[bytes, Pixels], None]


def with_pillow(jpg: bytes, out: Pixels) -> None:
    """The reference of every difference."""
    image = Image.open(io.BytesIO(jpg)).convert("RGB")
    out[:] = np.asarray(image.resize(out.shape[:2], Image.Resampling.BILINEAR))


def with_draft(jpg: bytes, out: Pixels) -> None:
    """Pillow may let libjpeg scale down by 2, 4 or 8 while decoding."""
    image = Image.open(io.BytesIO(jpg))
    image.draft("RGB", out.shape[:2])
    out[:] = np.asarray(image.convert("RGB").resize(out.shape[:2], Image.Resampling.BILINEAR))


def with_torchvision(jpg: bytes, out: Pixels) -> None:
    """torchvision.io, then torch's antialiased resize."""
    data = torch.frombuffer(bytearray(jpg), dtype=torch.uint8)
    planes = torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)
    resized = torch.nn.functional.interpolate(
        planes[None], out.shape[:2], mode="bilinear", antialias=True
    )
    torch.from_numpy(out).permute(2, 0, 1).copy_(resized[0])


def with_simplejpeg_and_pillow(jpg: bytes, out: Pixels) -> None:
    """simplejpeg, then Pillow's resize."""
    image = Image.fromarray(simplejpeg.decode_jpeg(jpg, "RGB"))
    out[:] = np.asarray(image.resize(out.shape[:2], Image.Resampling.BILINEAR))


def with_simplejpeg_scaled(jpg: bytes, out: Pixels) -> None:
    """simplejpeg scaled down while decoding, then torch's resize."""
    side = out.shape[0]
    pixels = simplejpeg.decode_jpeg(jpg, "RGB", min_height=side, min_width=side, min_factor=1)
    planes, target = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (pixels, out))
    torch._C._nn._upsample_bilinear2d_aa(planes, out.shape[:2], False, None, out=target)


def with_opencv(jpg: bytes, out: Pixels) -> None:
    """OpenCV, its area filter (it has no antialiased bilinear one)."""
    pixels = cv2.imdecode(np.frombuffer(jpg, np.uint8), cv2.IMREAD_COLOR_RGB)
    cv2.resize(pixels, out.shape[:2], dst=out, interpolation=cv2.INTER_AREA)


DECODERS: dict[str, Decode] = {
    "Pillow": with_pillow,
    "Pillow with draft": with_draft,
    "torchvision.io + torch resize": with_torchvision,
    "simplejpeg + Pillow resize": with_simplejpeg_and_pillow,
    "simplejpeg + torch resize (ours)": decode_into,
    "the same, scaled while decoding": with_simplejpeg_scaled,
    "OpenCV, area filter": with_opencv,
}


def compare(jpgs: list[bytes], side: int, rounds: int) -> str:
    """A table with a row per decoder."""
    outputs = {name: np.zeros((len(jpgs), side, side, 3), np.uint8) for name in DECODERS}

    def seconds(name: str) -> float:
        started = time.process_time()
        for jpg, slot in zip(jpgs, outputs[name], strict=True):
            DECODERS[name](jpg, slot)
        return (time.process_time() - started) / len(jpgs)

    rows = []
    for name, found in in_rounds({n: partial(seconds, n) for n in DECODERS}, rounds).items():
        distance = np.abs(outputs[name].astype(np.int16) - outputs["Pillow"])
        shares = [f"{100 * (distance > levels).mean():.2f} %" for levels in (0, 1)]
        rows.append(
            [name, f"{1e6 * min(found):.0f}", f"{1 / min(found):,.0f}", distance.max(), *shares]
        )
    head = ["decoder", "us", "per CPU second", "largest difference", "differing", "by more than 1"]
    return table(head, rows)


def main() -> None:
    """Compare on crops, on photos, and on photos where scaling while decoding can set in."""
    given = make_parser(__doc__, rounds=7).parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng, parts = np.random.default_rng(0), []
    large = replace(PHOTOS, width=2 * PHOTOS.width, height=2 * PHOTOS.height)
    for kind, count in ((CROPS, 1000), (PHOTOS, 60), (large, 30)):
        jpgs = [photo(rng, kind) for _ in range(count // 10 if given.quick else count)]
        mean = sum(map(len, jpgs)) / len(jpgs)
        parts.append(
            f"{kind.width}x{kind.height}, {mean / 1000:.1f} kB, to {kind.side}x{kind.side}:\n\n"
            + compare(jpgs, kind.side, 2 if given.quick else given.rounds)
        )
    finish(given, "\n".join(parts))


if __name__ == "__main__":
    main()
