"""Ray Data, scoring the same tars with the same encoder and batch size, on the same two cores.

Shapes: `actors`, two actors that decode and encode, one torch thread each, as ours; or `tasks`,
which decode and preprocess, and one actor that encodes with two threads. Reads and tasks ask for a
quarter of a CPU, so that neither shape starves.

The clock runs from the moment at which all actors have loaded the model until the last embedding is
here; what Ray Data read and preprocessed ahead meanwhile counts as nothing. It computes no
similarities and writes no file.
"""

import argparse
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.common.harness import pin
from benchmarks.scoring.data import CASES, Case, load
from benchmarks.scoring.workers import Places, choose_cores
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.ray_tasks import LOCAL_ENVIRONMENT
from vlal_dist.scoring.clip import ClipEncoder, PhaseSeconds
from vlal_dist.scoring.embed import box_crop

Batch = dict[str, Any]
OBJECT_STORE_BYTES = 1_000_000_000
READ_CPUS = 0.25


class Encode:
    """One Ray Data actor: a loaded model; takes `jpg` and `json`, or `pixels`.

    Args:
        folder: of the benchmark.
        case: what is scored.
        places: where the actors meet.
        threads: of torch.
    """

    def __init__(self, folder: Path, case: Case, places: Places, threads: int) -> None:
        torch.set_num_threads(threads)
        self.encoder = load(folder, case)
        self.ready = places.wait()

    def __call__(self, batch: Batch) -> Batch:
        """Keys and embeddings; when the actor was ready."""
        if "pixels" in batch:
            pixels = list(torch.from_numpy(np.stack(batch["pixels"])))
        else:
            pixels = crops_of(batch, self.encoder)
        embedding = self.encoder.encode_batch(pixels, seconds=PhaseSeconds())
        ready = np.full(len(pixels), self.ready)
        return {"key": batch["__key__"], "embedding": embedding, "ready": ready}


class Prepare:
    """Decodes and preprocesses in Ray tasks; the preprocessing is the encoder's own."""

    def __init__(self, preprocess: Any) -> None:
        self.prepare = preprocess

    def __call__(self, batch: Batch) -> Batch:
        """Keys and pixels."""
        pixels = [crop.numpy() for crop in crops_of(batch, self)]
        return {"__key__": batch["__key__"], "pixels": np.stack(pixels)}


def crops_of(batch: Batch, encoder: ClipEncoder | Prepare) -> list[torch.Tensor]:
    """Decode, cut and preprocess, with the functions that our actors use."""
    return [
        encoder.prepare(box_crop(decode_jpeg(jpg), tuple(json.loads(meta)["box_in_crop"])))
        for jpg, meta in zip(batch["jpg"], batch["json"], strict=True)
    ]


def embeddings(folder: Path, case: Case, shape: str, meeting: Path) -> Iterator[Batch]:
    """All batches of embeddings, in any order."""
    import ray.data

    tars = sorted((folder / case.name / "dataset/train/shards").glob("*.tar"))
    data = ray.data.read_webdataset(
        [str(tar) for tar in tars], decoder=None, num_cpus=READ_CPUS, override_num_blocks=len(tars)
    )
    number, threads = (2, 1) if shape == "actors" else (1, 2)
    if shape == "tasks":
        prepare = Prepare(load(folder, case).preprocess)
        data = data.map_batches(prepare, batch_size=case.batch, num_cpus=READ_CPUS)
    data = data.map_batches(
        Encode,
        fn_constructor_args=(folder, case, Places(meeting, tuple(range(number))), threads),
        batch_size=case.batch,
        compute=ray.data.ActorPoolStrategy(size=number),
        num_cpus=0.75,
    )
    yield from data.iter_batches(batch_size=None, prefetch_batches=0)


def measure(folder: Path, case: Case, shape: str) -> dict[str, float]:
    """Count images, and the seconds since all actors were ready."""
    cores, _ = choose_cores(2)
    pin(cores)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {
        **LOCAL_ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    count, ready, ended = 0, 0.0, 0.0
    with TemporaryDirectory() as meeting:
        for batch in embeddings(folder, case, shape, Path(meeting)):
            ended = time.perf_counter()
            count += len(batch["embedding"])
            ready = max(ready, float(batch["ready"].max()))
    ray.shutdown()
    if count != case.shards * case.shard_samples:
        raise SystemExit(f"{count} embeddings of {case.shards * case.shard_samples} images")
    return {"count": count, "seconds": ended - ready}


def main() -> None:
    """Measure one shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--shape", choices=("actors", "tasks"), required=True)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.folder, CASES[arguments.case], arguments.shape)))


if __name__ == "__main__":
    main()
