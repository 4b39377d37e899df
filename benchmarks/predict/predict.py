"""What predict costs beside the bare model, from files to a written file.

    python benchmarks/predict/predict.py [--quick] [--wall] [--depth 18] [--rounds 5]

A ResNet of random weights with VAW's numbers of objects and attributes, photos made from a seed:
60x80 to 64x64, and 500x375 to 224x224. The ways, in turn within each round:

    bare     forward passes alone, batches of floats ready in memory
    predict  the program's loop: read, decode, crop, forward, top k, JSON lines
    crops    the same without the model: what the crop threads can do

One torch thread and CPU seconds of the whole process, crop threads included: what other work on the
machine does not change. With --wall: wall seconds and torch's default threads, for a quiet machine.
The ratio is predict's speed to that of bare within a round; medians over rounds, and the range of
the ratio. Starting Python and loading the model, some seconds, are not in it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from vlal_dist.config.sections import ModelConfig, PredictConfig  # noqa: E402
from vlal_dist.data.loading.batch import to_floats  # noqa: E402
from vlal_dist.method.model import build_model  # noqa: E402
from vlal_dist.release.model import ExportedModel, ExportInfo  # noqa: E402
from vlal_dist.release.predict import Crop, make_crops, predict_requests  # noqa: E402
from vlal_dist.release.prediction_files import open_output  # noqa: E402
from vlal_dist.release.requests import Reject, open_requests  # noqa: E402
from vlal_dist.release.saved_model import SavedModelInfo  # noqa: E402
from vlal_dist.vocabulary import Vocabulary  # noqa: E402

OBJECTS, ATTRIBUTES = 1763, 591
SHAPES = {64: (60, 80, 512), 224: (500, 375, 32)}
"""Image side -> width and height of the photos, and how many."""
QUICK = {64: (60, 80, 128), 224: (500, 375, 16)}


def make_photos(folder: Path, *, width: int, height: int, count: int) -> None:
    """JPEGs that are smooth with some grain, so that they weigh what photos weigh."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
        grain = random.normal(0, 8, smooth.shape)
        pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=90)


def make_model(side: int, *, depth: int) -> ExportedModel:
    """Random weights, as an export holds them."""
    names = tuple(f"attribute {n}" for n in range(ATTRIBUTES))
    vocabulary = Vocabulary(
        objects=tuple(f"object {n}" for n in range(OBJECTS)),
        attributes=names,
        attribute_type=("other",) * ATTRIBUTES,
        prevalence=("head",) * ATTRIBUTES,
    )
    shape = {"depth": depth, "width": 64, "object_gate": True}
    sizes = {"num_objects": OBJECTS, "num_attributes": ATTRIBUTES}
    info = SavedModelInfo(
        **shape, **sizes, image_size=side, normalize=False, vocabulary_digest=vocabulary.digest,
        feasible_digest="", profile="paper", loss="selective", seed=0, step=0, epoch=0,
        validation_map=0.0,
    )  # fmt: skip
    return ExportedModel(
        ExportInfo(info, vocabulary, "none", 0.0), build_model(ModelConfig(**shape), **sizes), None
    )


class Ways:
    """The three ways over the same photos."""

    def __init__(self, side: int, depth: int, folder: Path) -> None:
        self.model, self.folder = make_model(side, depth=depth), folder
        self.config = PredictConfig(images=str(folder), object="object 7")
        self.photos, requests, _ = open_requests(self.config, self.model)
        self.requests = list(requests)
        squares = [one.pixels for one in self._made() if isinstance(one, Crop)]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        object_id = torch.full((len(squares),), 7)
        self.batches = [
            (to_floats(part, normalize=False), ids)
            for part, ids in zip(pixels.split(64), object_id.split(64), strict=True)
        ]

    def _made(self) -> Iterator[Crop | Reject]:
        return make_crops(self.requests, self.photos, self.model.info, self.config)

    @torch.inference_mode()
    def bare(self) -> None:
        """Forward passes alone."""
        for image, object_id in self.batches:
            self.model.network(image, object_id)

    def crops(self) -> None:
        """Crops alone."""
        for _ in self._made():
            pass

    def predict(self) -> None:
        """Everything."""
        with open_output(self.folder.with_suffix(".jsonl"), thresholds=False) as write:
            for found in predict_requests(self.model, self.requests, self.photos, self.config):
                assert not isinstance(found, Reject)
                write(found)


def compare(
    side: int,
    depth: int,
    shape: tuple[int, int, int],
    rounds: int,
    folder: Path,
    clock: Callable[[], float],
) -> str:
    """A row of the table."""
    width, height, count = shape
    folder /= f"{side}-{depth}"
    make_photos(folder, width=width, height=height, count=count)
    ways = Ways(side, depth, folder)
    runs: dict[str, Callable[[], None]] = {
        "bare": ways.bare, "predict": ways.predict, "crops": ways.crops,
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            started = clock()
            run()
            if number:
                taken[name].append(clock() - started)
    ms = {name: 1e3 * statistics.median(times) / count for name, times in taken.items()}
    ratios = [b / p for b, p in zip(taken["bare"], taken["predict"], strict=True)]
    row = (
        f"| ResNet-{depth}, {width}x{height} to {side}x{side} | {count} | {ms['bare']:.2f} "
        f"| {ms['predict']:.2f} | {ms['crops']:.2f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )
    print(row, flush=True)
    return row


def main() -> None:
    """Compare; print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer photos, two rounds")
    parser.add_argument("--wall", action="store_true", help="wall seconds, all threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    if not given.wall:
        torch.set_num_threads(1)
    clock, kind = (time.perf_counter, "wall") if given.wall else (time.process_time, "CPU")
    rounds = 2 if given.quick else given.rounds
    lines = [
        f"| model, photos | photos | bare, {kind} ms per photo | predict | crops alone | ratio |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for side, shape in (QUICK if given.quick else SHAPES).items():
            lines.append(compare(side, given.depth, shape, rounds, Path(folder), clock))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += ["", f"{rounds} rounds, {os.cpu_count()} cores, load averages at the end {load}."]
    text = "\n".join(lines)
    print(text)
    if given.markdown:
        given.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
