"""JPEG decoders on one core: speed, and distance from Pillow's own decoder and resize.

    make peers && python benchmarks/loader/loader.py --quick      # the environment, and the data
    PYTHONPATH=. .peers/bin/python benchmarks/decode/decode.py [--data FOLDER] [--markdown FILE]

Each decoder turns the same JPEG bytes into a uint8 square; CPU seconds, the decoders in turn within
each of the rounds, the least over rounds.
"""

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torchvision
from PIL import Image

from vlal_dist.data.loading.decode import decode_into

Pixels = npt.NDArray[np.uint8]
Decode = Callable[[bytes, Pixels], None]
ROUNDS = 7


def with_pillow(jpg: bytes, out: Pixels) -> None:
    """What every distance is measured from."""
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


def read_jpgs(root: Path, most: int) -> list[bytes]:
    """The first JPEGs of a packed dataset."""
    found = []
    for path in sorted((root / "train/shards").iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(".jpg") and file is not None:
                    found.append(file.read())
                if len(found) == most:
                    return found
    return found


def compare(jpgs: list[bytes], side: int) -> list[str]:
    """One table row per decoder."""
    outputs = {name: np.zeros((len(jpgs), side, side, 3), np.uint8) for name in DECODERS}
    best = dict.fromkeys(DECODERS, float("inf"))
    for _ in range(ROUNDS):
        for name, decode in DECODERS.items():
            started = time.process_time()
            for jpg, slot in zip(jpgs, outputs[name], strict=True):
                decode(jpg, slot)
            best[name] = min(best[name], (time.process_time() - started) / len(jpgs))
    rows = []
    for name, seconds in best.items():
        distance = np.abs(outputs[name].astype(np.int16) - outputs["Pillow"])
        rows.append(
            f"| {name} | {seconds * 1e6:.0f} | {1 / seconds:,.0f} | {distance.max()} "
            f"| {100 * (distance > 0).mean():.2f} % | {100 * (distance > 1).mean():.2f} % |"
        )
    return rows


def main() -> None:
    """Compare on crops and on photos; print a table for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/bench-loader"))
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    lines = []
    sizes = {"crops": (64, 1000), "photos": (224, 60), "large": (224, 30)}
    for kind, (side, most) in sizes.items():
        source = "photos" if kind == "large" else kind
        jpgs = read_jpgs(arguments.data / source / "dataset", most)
        if kind == "large":
            jpgs = [_doubled(jpg) for jpg in jpgs]
        size = Image.open(io.BytesIO(jpgs[0])).size
        mean = sum(map(len, jpgs)) / len(jpgs)
        lines += [
            f"{size[0]}x{size[1]}, {mean / 1000:.1f} kB, to {side}x{side}:",
            "",
            "| decoder | us | per CPU second | largest difference | differing | by more than 1 |",
            "|---|---|---|---|---|---|",
            *compare(jpgs, side),
            "",
        ]
    text = "\n".join(lines)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


def _doubled(jpg: bytes) -> bytes:
    """A photo of twice the width and height, where scaling while decoding can set in."""
    image = Image.open(io.BytesIO(jpg))
    sink = io.BytesIO()
    image.resize((2 * image.width, 2 * image.height)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


if __name__ == "__main__":
    main()
