"""`python -m vlal_dist.score_clip`: CLIP similarities of every crop, on Ray (Sec. 2.2).

The same command continues after any interruption: shards whose score file exists are skipped.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch

from vlal_dist.config.config import Config
from vlal_dist.config.scoring import ScoringSection
from vlal_dist.data.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.scores import write_scores_manifest
from vlal_dist.errors import ConfigError
from vlal_dist.observability.progress import Progress
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.scoring.actors import ActorPool, on_running_ray, ray_session
from vlal_dist.scoring.clip import load_clip
from vlal_dist.scoring.identity import ScoreSettings, adopt_settings
from vlal_dist.scoring.plan import Plan, Task, check_not_taken, make_plan
from vlal_dist.scoring.quality import Quality, check_split
from vlal_dist.scoring.score_shard import ShardResult
from vlal_dist.scoring.worker import ScoringJob, ShardScorer, identify
from vlal_dist.storage.store import open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What the workers did: results of the pending shards, shards given out again, seconds."""

    results: list[ShardResult]
    retried: int
    seconds: float


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Plan, score what is pending, read everything back, commit `scores.json`."""
    scoring = config.scoring
    running_ray = scoring.use_ray and on_running_ray()
    for key in ("dataset", "scores"):
        _refuse_relative_in_job(f"paths.{key}", getattr(config.paths, key))
    store = open_store(config.paths.scores)
    cache = Path(config.paths.cache).resolve()
    dataset = open_dataset(config.paths.dataset, cache=cache)
    digest, own_temperature = _identify(scoring, dataset)
    temperature = scoring.temperature or own_temperature
    manifest = {
        "dataset_digest": dataset.digest,
        "scorer_digest": digest,
        "feasible_digest": dataset.feasible.digest,
        "vocabulary_digest": dataset.vocabulary.digest,
        "temperature": temperature,
    }
    finished = check_not_taken(store, manifest, scoring.splits)
    plan = make_plan(dataset, store, scoring.splits, scoring.templates, scorer_digest=digest)
    if "plan" in flags:
        return _planned(plan, digest)
    wanted = ScoreSettings(
        batch_size=scoring.batch_size,
        threads=max(1, int(scoring.cpus_per_actor)),
        precision=scoring.precision,
        device=_device(scoring.device, running_ray=running_ray),
        temperature=temperature,
    )
    settings = adopt_settings(store, wanted, scorer_digest=digest)
    job = ScoringJob(
        dataset=dataset.store.url,
        cache=str(cache),
        scores=store.url,
        model=scoring.model,
        model_config_dir=_absolute(scoring.model_config_dir),
        weights=_absolute(scoring.weights),
        templates=tuple(scoring.templates),
        scorer_digest=digest,
        settings=settings,
        decode_threads=scoring.decode_threads,
    )
    outcome = _score(scoring, job, plan)
    quality, splits = Quality(), {}
    for split in scoring.splits:
        samples = check_split(
            dataset, split, store=store, header=manifest, temperature=temperature, quality=quality
        )
        splits[split] = {"samples": samples, "shards": len(open_split(dataset, split).shards)}
    if not finished:
        write_scores_manifest(store, {**manifest, "splits": splits, "settings": asdict(settings)})
    return _counts(plan, outcome, settings, quality, digest)


def _identify(scoring: ScoringSection, dataset: Dataset) -> tuple[str, float]:
    """Load the model on the CPU: scorer digest and the model's own temperature.

    Doing it here, before Ray and before any output, means that absent weights cost two seconds.
    """
    encoder = load_clip(
        model=scoring.model,
        model_config_dir=scoring.model_config_dir,
        weights=scoring.weights,
        precision=scoring.precision,
        device="cpu",
        batch_size=scoring.batch_size,
    )
    identity = identify(encoder, dataset, model=scoring.model, templates=tuple(scoring.templates))
    return identity.digest, encoder.temperature


def _score(scoring: ScoringSection, job: ScoringJob, plan: Plan) -> Outcome:
    """Score the pending shards on Ray or in this process, showing progress."""
    if not plan.pending:
        return Outcome([], 0, 0.0)
    if job.settings.device == "cpu":
        logger.warning("SCORING ON THE CPU: fine for small models and data, slow for others")
    started = time.monotonic()
    results: list[ShardResult] = []
    stop = threading.Event()
    with (
        _set_on_signal(stop),
        Progress("score", total=sum(plan.pending.values()), unit="crops") as progress,
    ):
        place = _on_ray if scoring.use_ray else _in_this_process
        retried = 0
        for result, lost in place(scoring, job, list(plan.pending), stop):
            retried = lost
            results.append(result)
            progress.advance(result.samples)
            if not result.identical:
                logger.warning(
                    "shard %d of %s was scored twice with different last bits (unequal devices?); "
                    "the first file stands",
                    result.shard,
                    result.split,
                )
    return Outcome(results, retried, time.monotonic() - started)


def _on_ray(
    scoring: ScoringSection, job: ScoringJob, tasks: list[Task], stop: threading.Event
) -> Iterator[tuple[ShardResult, int]]:
    actors = min(scoring.actors, len(tasks))
    with (
        ray_session(actors=actors, cpus_per_actor=scoring.cpus_per_actor),
        _set_on_signal(stop),  # again: ray.init puts its own handlers in place of ours
    ):
        pool = ActorPool(
            job,
            size=actors,
            cpus_per_actor=scoring.cpus_per_actor,
            gpus_per_actor=scoring.gpus_per_actor if job.settings.device == "cuda" else 0.0,
            max_retries=scoring.max_retries,
            stopped=stop.is_set,
        )
        list(pool.run([("prepare_text", ())]))  # one actor encodes the prompts, all read them
        for result in pool.run([("score", task) for task in tasks]):
            yield result, pool.retried


def _in_this_process(
    scoring: ScoringSection, job: ScoringJob, tasks: list[Task], stop: threading.Event
) -> Iterator[tuple[ShardResult, int]]:
    scorer = ShardScorer(job, stopped=stop.is_set)
    try:
        for split, shard in tasks:
            yield scorer.score(split, shard), 0
    finally:
        scorer.close()


@contextlib.contextmanager
def _set_on_signal(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`, which is looked at between batches or twice a second."""

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {name: signal.signal(name, note) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            # None: set by C code, which Python cannot put back
            signal.signal(name, signal.SIG_DFL if handler is None else handler)


def _device(wanted: str, *, running_ray: bool) -> str:
    """cpu or cuda. A Ray that others started is asked for GPUs unless the config says cpu.

    Raises:
        ConfigError: cuda is asked for on this machine, which has none.
    """
    here = torch.cuda.is_available()
    if wanted == "cuda" and not (running_ray or here):
        raise ConfigError(
            "scoring.device is cuda and this machine has no usable GPU; give cpu, or submit the "
            "job to a Ray that has GPUs"
        )
    if wanted == "auto":
        return "cuda" if running_ray or here else "cpu"
    return wanted


def _refuse_relative_in_job(name: str, path: str) -> None:
    """A job with a working directory runs in a copy of it, where outputs would be lost."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    in_copy = bool((job.get("runtime_env") or {}).get("working_dir"))
    if in_copy and "://" not in path and not Path(path).is_absolute():
        raise ConfigError(
            f"{name} {path} is relative, and this Ray job runs in a temporary copy of the "
            "submitted working directory; give an absolute path that all nodes see, or s3://"
        )


def _absolute(path: str | None) -> str | None:
    """A file or folder for workers that start elsewhere; an open_clip tag stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _planned(plan: Plan, digest: str) -> Counts:
    return {
        "shards_pending": len(plan.pending),
        "shards_done": plan.done,
        "samples_pending": sum(plan.pending.values()),
        "samples": plan.samples,
        "pairs": plan.pairs,
        "prompts": plan.prompts,
        "scorer_digest": digest,
    }


def _counts(
    plan: Plan, outcome: Outcome, settings: ScoreSettings, quality: Quality, digest: str
) -> Counts:
    images = sum(result.samples for result in outcome.results if result.pairs)
    return {
        "shards_scored": sum(result.created for result in outcome.results),
        "shards_skipped": plan.done + sum(not result.created for result in outcome.results),
        "shards_retried": outcome.retried,
        "images": images,
        "samples": plan.samples,
        "pairs": quality.pairs,
        "prompts": plan.prompts,
        "images_per_s": round(images / outcome.seconds, 1) if outcome.seconds else 0.0,
        "device": settings.device,
        "temperature": settings.temperature,
        "quality": quality.summary(),
        "scorer_digest": digest,
    }


PROGRAM = Program(
    name="score_clip",
    usage="python -m vlal_dist.score_clip",
    purpose=(
        "Embed every crop with CLIP and write its cosine with the prompt of each attribute that is "
        "feasible for its object. Runs on the Ray it is submitted to (ray job submit), else starts "
        "one on this machine. Repeat the command to continue."
    ),
    sections=("paths", "scoring"),
    flags=("plan", "json"),
    output=lambda config: config.paths.scores,
    work=work,
)


def main() -> int:
    """Run the program on the process's arguments; returns the exit code."""
    return run_program(PROGRAM, sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
