"""One measurement of our own scoring, or of a reference for it; started by score.py.

Prints one JSON object: `count` images and the `seconds` that they took.

    actors      Ray actors of our `ActorPool`, each on a core of its own; the driver and Ray's
                services on the others, if there are any
    processes   plain processes with `LocalPool`, each on a core of its own
    encoder     `ClipEncoder.encode_batch` alone, on one core, one random batch again and again
    naive       the authors' notebook: for each image all its prompts again, on one core

Of actors and processes the clock runs from the first shard handed out to the last result; models
are loaded and text banks read before. It includes reading, decoding, encoding, similarities, the
statistics of likelihoods and committed score files.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Event

import torch
from PIL import Image

from benchmarks.common.harness import pin
from benchmarks.scoring.data import CASES, TEMPLATE, Case, load, prepared, weights_path
from benchmarks.scoring.workers import PinnedActor, Places, choose_cores, settings_of
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.ray_tasks import ray_session
from vlal_dist.scoring import ray_cluster
from vlal_dist.scoring.clip import PhaseSeconds
from vlal_dist.scoring.driver import LocalPool
from vlal_dist.scoring.embed import box_crop
from vlal_dist.scoring.identity import ScoreSettings, ScoringJob
from vlal_dist.scoring.ray_cluster import ActorPool, Call
from vlal_dist.scoring.worker import ShardScorer

Found = dict[str, float]


def on_actors(folder: Path, case: Case, number: int) -> Found:
    """Score half of the shards per actor."""
    cores, others = choose_cores(number)
    pin(others)
    ray_cluster.ScoringActor = PinnedActor  # type: ignore[misc]
    os.environ.pop("RAY_ADDRESS", None)
    with prepared(folder, case) as job, ray_session(actors=number, cpus_per_actor=1):
        (Path(job.scores).parent / "cores.json").write_text(json.dumps(cores))
        pool = ActorPool(job, size=number, stop=Event())
        settings = settings_of(job)
        # Answered when all have the model and the text bank: see `PinnedActor`.
        list(pool.run([("prepare_text", (settings,))]))
        started = time.perf_counter()
        images = sum(result.images for result in pool.run(calls(case, settings, number)))
        seconds = time.perf_counter() - started
    return {"count": images, "seconds": seconds}


def in_processes(folder: Path, case: Case, number: int) -> Found:
    """Score half of the shards per process, without Ray."""
    cores, _ = choose_cores(number)
    with (
        prepared(folder, case) as job,
        ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        places = Places(Path(job.scores).parent, cores)
        futures = [
            pool.submit(
                in_one_process, job, calls(case, settings_of(job), number)[n::number], places
            )
            for n in range(number)
        ]
        images, started, ended = zip(*(future.result() for future in futures), strict=True)
    return {"count": sum(images), "seconds": max(ended) - min(started)}


def in_one_process(job: ScoringJob, mine: list[Call], places: Places) -> tuple[int, float, float]:
    """Images scored by this process, and its clock at start and end."""
    places.take()
    scorer = ShardScorer(job)
    scorer.prepare_text(settings_of(job))
    started = places.wait()
    images = sum(result.images for result in LocalPool(scorer).run(mine))
    ended = time.perf_counter()
    scorer.close()
    return images, started, ended


def calls(case: Case, settings: ScoreSettings, number: int) -> list[Call]:
    """What `number` workers are to do: half of the shards each."""
    return [("score", ("train", n, settings)) for n in range(case.shards * number // 2)]


def bare_encoder(folder: Path, case: Case) -> Found:
    """Encode as many random crops as one actor does."""
    cores, _ = choose_cores(1)
    pin(cores)
    torch.set_num_threads(1)
    encoder = load(folder, case)
    side = encoder.prepare(Image.new("RGB", (500, 375), "grey")).shape[-1]
    batch = list(torch.randn(case.batch, 3, side, side, generator=torch.Generator().manual_seed(0)))
    encoder.encode_batch(batch, seconds=PhaseSeconds())
    number = case.shards // 2 * case.shard_samples // case.batch
    started = time.perf_counter()
    for _ in range(number):
        encoder.encode_batch(batch, seconds=PhaseSeconds())
    return {"count": number * case.batch, "seconds": time.perf_counter() - started}


def naively(folder: Path, case: Case, seconds: float) -> Found:
    """Score image after image, two at least, until the time is over."""
    import open_clip

    cores, _ = choose_cores(1)
    pin(cores)
    torch.set_num_threads(1)
    model, _, preprocess = open_clip.create_model_and_transforms(
        case.model, pretrained=str(weights_path(folder, case))
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer(case.model)
    here = folder / case.name
    dataset = open_dataset(str(here / "dataset"), cache=here / "cache")
    reader, row = SampleReader(open_split(dataset, "train")), 0
    started = time.perf_counter()
    while row < 2 or time.perf_counter() - started < seconds:
        sample = reader.read(row)
        image = preprocess(box_crop(decode_jpeg(sample.jpg), sample.box_in_crop))[None]
        words, name = dataset.vocabulary.attributes, dataset.vocabulary.objects[sample.object_id]
        prompts = [
            TEMPLATE.format(attribute=words[n], object=name)
            for n in dataset.feasible.of(sample.object_id)
        ]
        text = tokenizer(prompts)
        with torch.no_grad():
            images, texts = model.encode_image(image), model.encode_text(text)
            images /= images.norm(dim=-1, keepdim=True)
            texts /= texts.norm(dim=-1, keepdim=True)
            (model.logit_scale.exp() * images @ texts.T).softmax(dim=-1)
        row += 1
    return {"count": row, "seconds": time.perf_counter() - started}


def main() -> None:
    """Measure one thing and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("actors", "processes", "encoder", "naive"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--number", type=int, default=1, help="actors or processes")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the naive way")
    arguments = parser.parse_args()
    folder, case = arguments.folder, CASES[arguments.case]
    measured = {
        "actors": lambda: on_actors(folder, case, arguments.number),
        "processes": lambda: in_processes(folder, case, arguments.number),
        "encoder": lambda: bare_encoder(folder, case),
        "naive": lambda: naively(folder, case, arguments.seconds),
    }
    print(json.dumps(measured[arguments.what]()), flush=True)


if __name__ == "__main__":
    main()
