"""The cost of predict beside the bare model, from files to a written file.

    python -m benchmarks.predict.predict [--quick] [--wall] [--depth 18] [--rounds 5]

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

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.common.data import CROPS, PHOTOS, photo
from benchmarks.common.harness import finish, in_rounds, machine, make_parser, spread, table
from vlal_dist.config.sections import ModelConfig, PredictConfig
from vlal_dist.data.loading.batch import to_floats
from vlal_dist.method.model import build_model
from vlal_dist.release.model import ExportedModel, ExportInfo
from vlal_dist.release.predict import Crop, make_crops, predict_requests
from vlal_dist.release.prediction_files import open_output
from vlal_dist.release.requests import Reject, open_requests
from vlal_dist.release.saved_model import SavedModelInfo
from vlal_dist.vocabulary import Vocabulary

OBJECTS, ATTRIBUTES = 1763, 591


def make_model(side: int, *, depth: int) -> ExportedModel:
    """Random weights, as an export holds them."""
    names = tuple(f"attribute {n}" for n in range(ATTRIBUTES))
    vocabulary = Vocabulary(
        objects=tuple(f"object {n}" for n in range(OBJECTS)),
        attributes=names,
        attribute_type=("other",) * ATTRIBUTES,
        prevalence=("head",) * ATTRIBUTES,
    )
    layers = ModelConfig.model_validate({"depth": depth})
    sizes = {"num_objects": OBJECTS, "num_attributes": ATTRIBUTES}
    info = SavedModelInfo(
        layers, **sizes, image_size=side, normalize=False, vocabulary_digest=vocabulary.digest,
        feasible_digest="", profile="paper", loss="selective", seed=0, step=0, epoch=0,
        validation_map=0.0,
    )  # fmt: skip
    return ExportedModel(
        ExportInfo(info, vocabulary, "none", 0.0), build_model(layers, **sizes), None
    )


class Ways:
    """The three ways over the photos of a folder."""

    def __init__(self, side: int, depth: int, folder: Path) -> None:
        self.model, self.folder = make_model(side, depth=depth), folder
        self.config = PredictConfig(images=str(folder), object="object 7")
        self.photos, requests, _ = open_requests(self.config, self.model)
        self.requests = list(requests)
        crops = [one.pixels for one in self._crops() if isinstance(one, Crop)]
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        object_id = torch.full((len(crops),), 7)
        self.batches = [
            (to_floats(part, normalize=False), ids)
            for part, ids in zip(pixels.split(64), object_id.split(64), strict=True)
        ]

    def _crops(self) -> Iterator[Crop | Reject]:
        return make_crops(self.requests, self.photos, self.model.info, self.config)

    @torch.inference_mode()
    def bare(self) -> None:
        """Forward passes alone."""
        for image, object_id in self.batches:
            self.model.network(image, object_id)

    def crops(self) -> None:
        """Crops alone."""
        for _ in self._crops():
            pass

    def predict(self) -> None:
        """Everything."""
        with open_output(self.folder.with_suffix(".jsonl"), thresholds=False) as write:
            for found in predict_requests(self.model, self.requests, self.photos, self.config):
                assert not isinstance(found, Reject)
                write(found)


def main() -> None:
    """Compare; print the table, and write it where the command line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--wall", action="store_true", help="wall seconds, all threads")
    parser.add_argument("--depth", type=int, default=18)
    given = parser.parse_args()
    if not given.wall:
        torch.set_num_threads(1)
    clock, unit = (time.perf_counter, "wall") if given.wall else (time.process_time, "CPU")
    rounds, rows = 2 if given.quick else given.rounds, []

    def seconds(way: Callable[[], None]) -> float:
        started = clock()
        way()
        return clock() - started

    for kind in (replace(CROPS, count=512), replace(PHOTOS, count=32)):
        kind = replace(kind, count=kind.count // 4 if given.quick else kind.count)
        with tempfile.TemporaryDirectory() as place:
            folder, rng = Path(place) / "photos", np.random.default_rng(0)
            folder.mkdir()
            for number in range(kind.count):
                (folder / f"{number:05d}.jpg").write_bytes(photo(rng, kind))
            ways = Ways(kind.side, given.depth, folder)
            calls = {
                name: partial(seconds, getattr(ways, name)) for name in ("bare", "predict", "crops")
            }
            in_rounds(calls, 1)  # warms up
            found = in_rounds(calls, rounds)
        ms = [f"{1e3 * median(times) / kind.count:.2f}" for times in found.values()]
        shapes = f"{kind.width}x{kind.height} to {kind.side}x{kind.side}"
        faster = spread([b / p for b, p in zip(found["bare"], found["predict"], strict=True)])
        rows.append([f"ResNet-{given.depth}, {shapes}", kind.count, *ms, faster])
    head = ["model, photos", "photos", f"bare, {unit} ms per photo", "predict", "crops", "ratio"]
    finish(given, f"{table(head, rows)}\n{rounds} rounds, {machine()}\n")


if __name__ == "__main__":
    main()
