"""Data of score.py: packed crops, models with random weights, prepared score roots.

Four crops of 250x187 pixels from each made-up photo of 500x375; two objects with 100 feasible
attributes each, drawn from VAW's 591 with frequencies that fall as 1 / rank. (Over VAW's objects
the mean is 16; over its instances, which are mostly of frequent objects, about a hundred.) Each
crop is annotated with two of them present and two absent. All shards hold the same number of crops,
a multiple of the batch size: real shards are so large that their last batch hardly counts.

A prepared score root holds the settings and the text bank, which are made once and never measured.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from threading import Event
from typing import Any

import numpy as np
import safetensors.torch
import torch

from benchmarks.common.data import ATTRIBUTES, Kind, Records, attribute_shares, make, record
from shard_tools.pack import BYTES_PER_PIXEL, BYTES_PER_SAMPLE
from vlal_dist.config.sections import ScoringConfig
from vlal_dist.data.format.dataset import open_dataset
from vlal_dist.scoring.clip import ClipEncoder, load_clip
from vlal_dist.scoring.identity import ScorerIdentity, ScoringJob, identify, store_settings
from vlal_dist.scoring.text_bank import ensure_bank
from vlal_dist.storage.store import open_store

OBJECTS, FEASIBLE = 2, 100
WIDTH, HEIGHT = 250, 187  # of a crop: a quarter of a photo
TEMPLATE = "a photo of {attribute} {object}"
SEED = 0


@dataclass(frozen=True)
class Case:
    """A model and the crops that it scores.

    Attributes:
        name: folder.
        model: open_clip name.
        config: of a model that open_clip does not ship.
        batch: crops per encoder call.
        shard_samples: crops of a shard.
        shards: in all; one process scores the first half of them, two score all.
    """

    name: str
    model: str
    config: dict[str, Any] | None
    batch: int
    shard_samples: int
    shards: int

    @property
    def kind(self) -> Kind:
        """The photos; a shard is closed at the crop that reaches its size."""
        sample = WIDTH * HEIGHT * BYTES_PER_PIXEL + BYTES_PER_SAMPLE
        photos = self.shards * self.shard_samples // 4
        return Kind(self.name, photos, 500, 375, 14.0, 90, 0, int(self.shard_samples * sample))


SMALL_CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {
        "image_size": 64,
        "layers": [1, 2, 2, 1],
        "width": 32,
        "head_width": 32,
        "patch_size": None,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
VIT = Case("vit", "ViT-B-32", None, 32, 32, 16)
SMALL = Case("small", "bench-small", SMALL_CONFIG, 64, 128, 64)
QUICK_VIT = replace(VIT, name="vit-quick", shards=4)
QUICK_SMALL = replace(SMALL, name="small-quick", shards=8)
CASES = {case.name: case for case in (VIT, SMALL, QUICK_VIT, QUICK_SMALL)}


def prepare(folder: Path, case: Case) -> None:
    """Make what a case needs, unless it is there."""
    if (folder / case.name / "prepared.json").exists():
        return
    make(folder, case.kind, annotate=annotate)
    make_weights(folder, case)
    begin(folder, case)


def annotate(rng: np.random.Generator, kind: Kind) -> Records:
    """Records of four crops for each photo; each object's feasible attributes in turn."""
    share, records = attribute_shares(), []
    sets = [rng.choice(ATTRIBUTES, FEASIBLE, replace=False, p=share) for _ in range(OBJECTS)]
    for number in range(4 * kind.count):
        turn, at = divmod(number, OBJECTS)
        named = [f"a{n}" for n in np.take(sets[at], range(4 * turn, 4 * turn + 4), mode="wrap")]
        down, right = divmod(number % 4, 2)
        box = [right * WIDTH, down * HEIGHT, WIDTH, HEIGHT]
        records.append(record(number, number // 4, box, f"object{at}", named[:2], named[2:]))
    return records


def weights_path(folder: Path, case: Case) -> Path:
    """Where the weights of a case's model lie; its config, if any, beside them."""
    return folder / "models" / f"{case.model}.safetensors"


def make_weights(folder: Path, case: Case) -> None:
    """Random weights from a seed, unless they are there."""
    import open_clip

    path = weights_path(folder, case)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if case.config is not None:
        config = path.with_suffix(".json")
        config.write_text(json.dumps(case.config))
        open_clip.add_model_config(config)
    torch.manual_seed(SEED)
    net = open_clip.create_model(case.model)
    safetensors.torch.save_file(net.state_dict(), path)


def section(folder: Path, case: Case) -> ScoringConfig:
    """The config section of a case: fp32 on one core."""
    return ScoringConfig(
        model=case.model,
        model_config_dir=None if case.config is None else str(folder / "models"),
        weights=str(weights_path(folder, case)),
        templates=[TEMPLATE],
        cpus_per_actor=1,
        max_retries=0,
    )


def load(folder: Path, case: Case) -> ClipEncoder:
    """The case's encoder, on the CPU."""
    return load_clip(section(folder, case), device="cpu", batch_size=case.batch)


def begin(folder: Path, case: Case) -> None:
    """A score root with settings and text bank, and what a job for it must say."""
    encoder, here = load(folder, case), folder / case.name
    dataset = open_dataset(str(here / "dataset"), cache=here / "cache")
    scoring = section(folder, case)
    job = ScoringJob(
        scoring=scoring,
        dataset=str(here / "dataset"),
        scores=str(here / "prepared"),
        cache=str(here / "cache"),
        identity=identify(encoder, dataset, scoring),
        device="cpu",
        temperature=encoder.temperature,
    )
    store = open_store(job.scores)
    store_settings(store, job, job.settings(case.batch, 1))
    digest = job.identity.digest
    ensure_bank(store, encoder, dataset, templates=[TEMPLATE], scorer_digest=digest, stop=Event())
    (here / "prepared.json").write_text(json.dumps(asdict(job.identity)) + "\n")


@contextmanager
def prepared(folder: Path, case: Case) -> Iterator[ScoringJob]:
    """A job with a fresh copy of the prepared score root, gone afterwards."""
    here = folder / case.name
    known = json.loads((here / "prepared.json").read_text())
    fresh = Path(mkdtemp(prefix="scores-", dir=folder))
    try:
        shutil.copytree(here / "prepared", fresh / "scores")
        settings = json.loads(next((here / "prepared").glob("settings-*.json")).read_text())
        yield ScoringJob(
            scoring=section(folder, case),
            dataset=str(here / "dataset"),
            scores=str(fresh / "scores"),
            cache=str(here / "cache"),
            identity=ScorerIdentity(**{**known, "templates": tuple(known["templates"])}),
            device="cpu",
            temperature=settings["temperature"],
        )
    finally:
        shutil.rmtree(fresh)
