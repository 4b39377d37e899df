"""`python -m vlal_dist.score_clip`: CLIP similarities of every crop, on Ray (Sec. 2.2).

The same command continues after any interruption: shards whose score file exists are skipped.
"""

import contextlib
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch

from vlal_dist.config.sections import Config, ScoringConfig
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.scores import write_scores_manifest
from vlal_dist.errors import ConfigError
from vlal_dist.observability.logs import Progress
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.scoring.clip import load_clip
from vlal_dist.scoring.driver import (
    LocalWorkers,
    Outcome,
    Plan,
    Workers,
    check_not_taken,
    closing,
    forget_quarantined,
    known_settings,
    make_plan,
    new_settings,
    planned,
    read_embeddings_manifest,
    score_all,
    stored_settings_of,
)
from vlal_dist.scoring.identity import ScorerIdentity, ScoreSettings, warn_of_other_settings
from vlal_dist.scoring.object_vectors import make_object_vectors
from vlal_dist.scoring.quality import QualityTotals, type_names
from vlal_dist.scoring.ray_cluster import (
    ActorPool,
    on_running_ray,
    ray_session,
    refuse_relative_in_job,
)
from vlal_dist.scoring.worker import ScoringJob, ShardScorer, identify
from vlal_dist.storage.store import Store, open_store

logger = logging.getLogger(__name__)


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Plan, score what is pending, check what is there, commit `scores.json`."""
    scoring = config.scoring
    if "object-vectors" in flags:
        refuse_relative_in_job("--object-vectors", flags["object-vectors"])
        refuse_relative_in_job("paths.instances", config.paths.instances)
        return make_object_vectors(
            flags["object-vectors"],
            instances=config.paths.instances,
            model=scoring.model,
            model_config_dir=scoring.model_config_dir,
            weights=scoring.weights,
        )
    running_ray = scoring.use_ray and on_running_ray()
    for key in ("dataset", "scores"):
        refuse_relative_in_job(f"paths.{key}", getattr(config.paths, key))
    store = open_store(config.paths.scores)
    cache = Path(config.paths.cache).resolve()
    dataset = open_dataset(config.paths.dataset, cache=cache)
    identity, own_temperature = _identify(scoring, dataset)
    job = _job(
        scoring,
        dataset,
        scores=store.url,
        cache=cache,
        identity=identity,
        temperature=scoring.temperature or own_temperature,
        device=_device(scoring.device, running_ray=running_ray),
    )
    manifest = {
        "dataset_digest": dataset.digest,
        "scorer_digest": identity.digest,
        "embedder_digest": identity.embedder_digest,
        "feasible_digest": dataset.feasible.digest,
        "vocabulary_digest": dataset.vocabulary.digest,
        "temperature": job.temperature,
    }
    plan = make_plan(
        dataset, store, scoring.splits, scoring.templates, scorer_digest=identity.digest
    )
    if "retry-quarantined" in flags and "plan" not in flags:
        plan = forget_quarantined(dataset, store, plan, header=manifest, cache=cache)
    finished = check_not_taken(store, manifest, scoring.splits)
    if "plan" in flags:
        return planned(plan, job, stored_settings_of(store, job), actors=scoring.actors)
    known = known_settings(store, job)
    allowed = max(int(scoring.max_quarantined * plan.samples), int(scoring.max_quarantined > 0))
    outcome = Outcome(QualityTotals(type_names(dataset.vocabulary)), allowed)
    started = time.monotonic()
    settings, retried = _score(scoring, job, plan, known, store=store, outcome=outcome)
    if not finished:
        splits = {
            name: {"samples": count, "shards": len(open_split(dataset, name).shards)}
            for name, count in outcome.samples.items()
        }
        found = {"splits": splits, "quarantined": outcome.quarantined, "settings": asdict(settings)}
        write_scores_manifest(store, {**manifest, **found})
    return closing(plan, outcome, settings, retried, time.monotonic() - started, identity.digest)


def _identify(scoring: ScoringConfig, dataset: Dataset) -> tuple[ScorerIdentity, float]:
    """Load the model on the CPU: the scorer's identity and the model's own temperature.

    Doing it here, before Ray and before any output, means that absent weights cost two seconds.
    """
    encoder = load_clip(
        model=scoring.model,
        model_config_dir=scoring.model_config_dir,
        weights=scoring.weights,
        precision=scoring.precision,
        device="cpu",
        batch_size=1,
    )
    identity = identify(encoder, dataset, model=scoring.model, templates=tuple(scoring.templates))
    return identity, encoder.temperature


def _job(
    scoring: ScoringConfig,
    dataset: Dataset,
    *,
    scores: str,
    cache: Path,
    identity: ScorerIdentity,
    temperature: float,
    device: str,
) -> ScoringJob:
    stored = None if scoring.embeddings is None else open_store(scoring.embeddings)
    known = stored and read_embeddings_manifest(stored, embedder_digest=identity.embedder_digest)
    return ScoringJob(
        dataset=dataset.store.url,
        cache=str(cache),
        scores=scores,
        model=scoring.model,
        model_config_dir=_absolute(scoring.model_config_dir),
        weights=_absolute(scoring.weights),
        templates=tuple(scoring.templates),
        scorer_digest=identity.digest,
        precision=scoring.precision,
        device=device,
        compiled=scoring.compile,
        threads=max(1, int(scoring.cpus_per_actor)),
        temperature=temperature,
        embeddings=None if stored is None else stored.url,
        embeddings_manifest=json.dumps(known or {}),
    )


def _score(
    scoring: ScoringConfig,
    job: ScoringJob,
    plan: Plan,
    known: ScoreSettings | None,
    *,
    store: Store,
    outcome: Outcome,
) -> tuple[ScoreSettings, int]:
    """Score and check on Ray or in this process, showing progress.

    Returns:
        The settings that were used, and how many calls were given out again.
    """
    if job.device == "cpu" and plan.pending and job.embeddings is None:
        logger.warning("SCORING ON THE CPU: fine for small models and data, slow for others")
    stop = threading.Event()
    with (
        _set_on_signal(stop),
        _workers(scoring, job, plan, stop) as workers,
        _set_on_signal(stop),  # again: ray.init puts its own handlers in place of ours
        Progress("score", total=plan.samples, unit="crops") as progress,
    ):
        settings = known or new_settings(
            job,
            workers,
            store,
            first=next(iter(plan.pending), None),
            batch_size=scoring.batch_size,
            decode_threads=scoring.decode_threads,
        )
        asked: dict[str, object] = {
            "batch_size": scoring.batch_size,
            "decode_threads": scoring.decode_threads,
            "threads": job.threads,
            "device": job.device,
            "compiled": job.compiled,
        }
        warn_of_other_settings(settings, asked, store.url)
        score_all(
            workers,
            pending=list(plan.pending),
            present=plan.present,
            settings=settings,
            outcome=outcome,
            advance=progress.advance,
        )
        return settings, workers.retried


@contextlib.contextmanager
def _workers(
    scoring: ScoringConfig, job: ScoringJob, plan: Plan, stop: threading.Event
) -> Iterator[Workers]:
    if not scoring.use_ray or not plan.pending:
        scorer = ShardScorer(job, stopped=stop.is_set)
        try:
            yield LocalWorkers(scorer)
        finally:
            scorer.close()
        return
    actors = min(scoring.actors, len(plan.pending))
    with ray_session(actors=actors, cpus_per_actor=scoring.cpus_per_actor):
        yield ActorPool(
            job,
            size=actors,
            cpus_per_actor=scoring.cpus_per_actor,
            gpus_per_actor=scoring.gpus_per_actor if job.device == "cuda" else 0.0,
            max_retries=scoring.max_retries,
            stopped=stop.is_set,
        )


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


def _absolute(path: str | None) -> str | None:
    """A file or folder for workers that start elsewhere; an open_clip tag stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


PROGRAM = Program(
    name="score_clip",
    usage="python -m vlal_dist.score_clip",
    purpose=(
        "Embed every crop with CLIP and write its cosine with the prompt of each attribute that is "
        "feasible for its object. Runs on the Ray it is submitted to (ray job submit), else starts "
        "one on this machine. Repeat the command to continue."
    ),
    sections=("paths", "scoring", "observability"),
    flags=("plan", "json", "retry-quarantined", "object-vectors"),
    output=lambda config, flags: (
        config.paths.instances if "object-vectors" in flags else config.paths.scores
    ),
    work=work,
)


def main() -> int:
    """Run the program on the process's arguments; returns the exit code."""
    return run_program(PROGRAM, sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
