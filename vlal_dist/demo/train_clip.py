"""Train the demo's tiny CLIP: `python -m vlal_dist.demo.train_clip --out runs/demo/clip`.

It takes the place of a public vision-language model: a contrastive image-text model of open_clip,
trained on rendered images of other seeds than the dataset's, with captions that name one to three
attributes and the object. Writes `demo_clip.json` (open_clip's model config) and
`demo_clip.safetensors` (fp16).
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from vlal_dist.demo.scene import draw_scene
from vlal_dist.demo.world import salience

NAME = "demo_clip"
IMAGES = 600
EPOCHS = 9
BATCH_SIZE = 64
PEAK_RATE = 2e-3
MAX_LOGIT_SCALE = math.log(100.0)
"""CLIP's own bound on the learned scale."""
_WINDOW = 64
"""The model's image side (`demo_clip.json`)."""
_SIDE = 72
"""Side of the stored crops (pixels); random windows are cut from it."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Crop:
    """One rendered object with its attributes.

    Attributes:
        pixels: uint8 [72, 72, 3], the middle of its box.
        kind: name of the object.
        attributes: every attribute present.
    """

    pixels: Pixels
    kind: str
    attributes: tuple[str, ...]


def crops_of(task: tuple[int, int]) -> list[Crop]:
    """Render image (seed, index) and cut out the middle of each box, as the scorer does."""
    rng = np.random.default_rng(task)
    picture, objects = draw_scene(rng)
    found = []
    for placed in objects:
        x, y, width, height = placed.box
        crop = picture.crop((x, y, x + width, y + height))
        scale = _SIDE / min(width, height)
        wide, high = max(_SIDE, round(width * scale)), max(_SIDE, round(height * scale))
        crop = crop.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - _SIDE) // 2, (high - _SIDE) // 2
        pixels = np.asarray(crop.crop((left, top, left + _SIDE, top + _SIDE)), dtype=np.uint8)
        attributes = tuple(sorted(placed.traits.attributes()))
        found.append(Crop(pixels=pixels, kind=placed.traits.kind, attributes=attributes))
    return found


def caption(rng: np.random.Generator, crop: Crop) -> str:
    """A sentence with one to three of the attributes, salient ones more often."""
    weight = np.array([salience(name) for name in crop.attributes])
    count = min(int(rng.integers(1, 4)), len(crop.attributes))
    chosen = rng.choice(crop.attributes, size=count, replace=False, p=weight / weight.sum())
    return f"a photo of {' '.join(chosen)} {crop.kind}"


def train(crops: Sequence[Crop], *, config_dir: Path, seed: int, epochs: int) -> dict[str, Tensor]:
    """Contrastive training; returns the weights.

    Args:
        crops: training images.
        config_dir: folder of the open_clip model config.
        seed: initial weights, order, windows, captions.
        epochs: passes over the crops.
    """
    rng = np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    open_clip.add_model_config(config_dir)
    model = open_clip.CLIP(**open_clip.get_model_config(NAME))
    tokenizer = open_clip.get_tokenizer(NAME)
    images = torch.from_numpy(np.stack([crop.pixels for crop in crops]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.0)
    steps = epochs * (len(crops) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        order = rng.permutation(len(crops))
        total = 0.0
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            text = tokenizer([caption(rng, crops[row]) for row in rows])
            picture = _augment(rng, images[torch.from_numpy(rows)])
            visual, textual, scale = model(picture, text)
            logits = scale * visual @ textual.T
            truth = torch.arange(len(rows))
            losses = [functional.cross_entropy(one, truth) for one in (logits, logits.T)]
            loss = losses[0] + losses[1]
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            total += loss.item() / 2
        mean = total / (len(order) // BATCH_SIZE)
        sys.stdout.write(f"train_clip: epoch {epoch + 1}/{epochs}, loss {mean:.3f}\n")
        sys.stdout.flush()
    return {name: value.detach() for name, value in model.state_dict().items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, render, train, save."""
    program = "python -m vlal_dist.demo.train_clip"
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo/clip"), help="folder written")
    parser.add_argument("--seed", type=int, default=1001, help="not the dataset's")
    parser.add_argument("--images", type=int, default=IMAGES, help="images rendered to train on")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over their objects")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    given = parser.parse_args(argv)
    weights = given.out / f"{NAME}.safetensors"
    if weights.is_file():
        sys.stdout.write(f"train_clip: {weights} is there; remove it to train again\n")
        return 0
    started = time.monotonic()
    tasks = [(given.seed, index) for index in range(given.images)]
    # Not fork: torch's threads do not survive it.
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        crops = [crop for found in pool.map(crops_of, tasks, chunksize=10) for crop in found]
    rendered = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).parent / f"{NAME}.json", given.out / f"{NAME}.json")
    state = train(crops, config_dir=given.out, seed=given.seed, epochs=given.epochs)
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}
    partial = weights.with_suffix(".partial")
    save_file(half, partial)
    partial.replace(weights)  # a killed run leaves no weights that look finished
    tau = 1 / math.exp(float(state["logit_scale"]))
    summary = {
        "crops": len(crops),
        "tau": round(tau, 4),
        "megabytes": round(weights.stat().st_size / 1e6, 1),
        "render_s": round(rendered - started, 1),
        "train_s": round(time.monotonic() - rendered, 1),
    }
    sys.stdout.write(f"train_clip: done: {json.dumps(summary)}\n")
    return 0


def _augment(rng: np.random.Generator, images: Tensor) -> Tensor:
    """A random window for the batch, a random half of it mirrored, in CLIP's normalisation."""
    left, top = (int(value) for value in rng.integers(0, _SIDE - _WINDOW + 1, 2))
    window = images[:, top : top + _WINDOW, left : left + _WINDOW].permute(0, 3, 1, 2).float() / 255
    mirrored = torch.from_numpy(rng.random(len(window)) < 0.5)
    window[mirrored] = window[mirrored].flip(3)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (window - mean) / deviation


if __name__ == "__main__":
    sys.exit(main())
