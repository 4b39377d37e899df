"""The scoring driver: plan the shards that are left, hand them to workers, sum up the results."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch

from vlal_dist.config.sections import PathsConfig, ScoringConfig
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.scores import finished_manifest, quarantined_of, write_scores_manifest
from vlal_dist.errors import ConfigError, ConflictError, DataError, NotFoundError
from vlal_dist.observability.logs import Progress
from vlal_dist.processes import set_on_stop_signal
from vlal_dist.ray_tasks import (
    check_shared,
    on_running_ray,
    ray_session,
    refuse_relative_in_job,
)
from vlal_dist.scoring.clip import FOLDER, ClipEncoder, PhaseSeconds, load_clip
from vlal_dist.scoring.embed import SplitShard
from vlal_dist.scoring.identity import (
    ScoreSettings,
    ScoringJob,
    check_same_weights,
    identify,
    store_settings,
    stored_settings,
    warn_of_ignored,
)
from vlal_dist.scoring.quality import (
    QualityTotals,
    open_shard_scores,
    type_names,
    warn_near_chance,
)
from vlal_dist.scoring.ray_cluster import UNDER_WAY, ActorPool, Call
from vlal_dist.scoring.shard_task import ShardResult
from vlal_dist.scoring.text_bank import (
    bank_key,
    build_prompts,
    check_prompts,
    remark_on_cut_prompts,
)
from vlal_dist.scoring.worker import ShardScorer
from vlal_dist.storage.store import Store, open_store

logger = logging.getLogger(__name__)

ShardPosition = tuple[str, int]
"""Split name and position of a shard in it."""


def score_dataset(
    scoring: ScoringConfig,
    paths: PathsConfig,
    *,
    plan_only: bool = False,
    retry_quarantined: bool = False,
    retry_rejected: bool = False,
    make_way: Callable[[], bool] = lambda: False,
) -> dict[str, object]:
    """Score the shards that have no score file, check the others, commit `scores.json`.

    Args:
        scoring, paths: config sections.
        plan_only: only return what a run would do.
        retry_quarantined: first delete the score files that list unusable crops.
        retry_rejected: the dataset may have changed since `scores.json` (pack --retry-rejected):
            score the shards that are new, and write it again.
        make_way: called before the first write; returns whether it may have removed something.

    Returns:
        Closing counts, for JSON.

    Raises:
        VlalError: `ConfigError`, `DataError`, `ConflictError`, `StorageError`, `Stopped`.
    """
    running_ray = scoring.use_ray and on_running_ray()
    refuse_relative_in_job("paths.dataset", paths.dataset)
    refuse_relative_in_job("paths.scores", paths.scores)
    store = open_store(paths.scores)
    dataset = open_dataset(paths.dataset, cache=Path(paths.cache).resolve())
    job, encoder = make_job(scoring, dataset, scores=store.url, running_ray=running_ray)
    manifest = {
        **job.digests,
        "dataset_digest": dataset.digest,
        "embedder_digest": job.identity.embedder_digest,
        "temperature": job.temperature,
    }
    plan = make_plan(dataset, store, job)
    checked = store.exists(bank_key(job.identity.digest))
    (remark_on_cut_prompts if checked else check_prompts)(encoder, dataset, scoring.templates)
    if not plan_only and make_way():
        plan = make_plan(dataset, store, job)
    check_same_weights(store, job, keep=not plan_only)
    del encoder  # the workers load their own
    if retry_quarantined and not plan_only and forget_quarantined(dataset, store, plan, job):
        plan = make_plan(dataset, store, job)
    finished = check_not_taken(store, manifest, scoring.splits, retry_rejected=retry_rejected)
    if retry_rejected and not (finished or plan_only):
        store.delete("scores.json")
    if plan_only:
        return planned(plan, job, stored_settings(store, job))
    known = known_settings(store, job)
    share = scoring.max_quarantined
    totals = ScoringTotals(
        QualityTotals(type_names(dataset.vocabulary)),
        max_quarantined=max(int(share * plan.samples), int(share > 0)),
    )
    started = time.monotonic()
    settings, retried = _score(job, plan, store, known, totals)
    if not finished:
        splits = {
            name: {"samples": count, "shards": len(open_split(dataset, name).shards)}
            for name, count in totals.samples.items()
        }
        found = {"splits": splits, "quarantined": totals.quarantined, "settings": asdict(settings)}
        write_scores_manifest(store, {**manifest, **found})
    warn_near_chance(totals.quality.summary())
    return closing(plan, job, totals, settings, retried, seconds=time.monotonic() - started)


def make_job(
    scoring: ScoringConfig, dataset: Dataset, *, scores: str, running_ray: bool
) -> tuple[ScoringJob, ClipEncoder]:
    """What the workers are given, and the model on the CPU, for its identity and its tokenizer.

    Here, before Ray and before any output, absent weights are reported within two seconds.

    Raises:
        ConfigError: absent weights; no GPU for device cuda; embeddings of another model.
        DataError: the embeddings' scoring is not finished.
    """
    encoder = load_clip(scoring.model_copy(update={"compile": False}), device="cpu")
    identity = identify(encoder, dataset, scoring)
    here = torch.cuda.is_available()
    if scoring.device == "cuda" and not (running_ray or here):
        raise ConfigError(
            "scoring.device is cuda and this machine has no usable GPU; give cpu, or submit the "
            "job to a Ray that has GPUs"
        )
    auto = "cuda" if running_ray or here else "cpu"
    stored = None if scoring.embeddings is None else open_store(scoring.embeddings)
    known = {} if stored is None else finished_manifest(stored)
    theirs, ours = known.get("embedder_digest"), identity.embedder_digest
    if stored is not None and theirs != ours:
        raise ConfigError(
            f"scoring.embeddings {stored.url} has embedder_digest {theirs}, this run has {ours}: "
            "another model, weights, preprocessing or precision; give those it was scored with, "
            "or score the images again"
        )
    # Workers start in other folders.
    absolute = {
        "model": _absolute_model(scoring.model),
        "weights": _absolute(scoring.weights),
        "model_config_dir": _absolute(scoring.model_config_dir),
        "embeddings": None if stored is None else stored.url,
    }
    job = ScoringJob(
        scoring=scoring.model_copy(update=absolute),
        dataset=dataset.store.url,
        scores=scores,
        cache=str(dataset.cache),
        identity=identity,
        device=auto if scoring.device == "auto" else scoring.device,
        temperature=scoring.temperature or encoder.temperature,
        embeddings_manifest=known,
    )
    return job, encoder


def _absolute(path: str | None) -> str | None:
    """A file or folder as an absolute path; an open_clip tag stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _absolute_model(model: str) -> str:
    """`local-dir:FOLDER` with an absolute path; other names stay."""
    if not model.startswith(FOLDER):
        return model
    return FOLDER + str(Path(model.removeprefix(FOLDER)).resolve())


@dataclass(frozen=True)
class ScoringPlan:
    """What there is to score.

    Attributes:
        pending: shards without a score file, in order, with their samples.
        present: shards that have one, in order.
        pending_bytes: size of the tars without.
        samples: samples of all shards.
        pairs: feasible (object, attribute) pairs.
        prompts: different prompts.
    """

    pending: dict[ShardPosition, int]
    present: list[ShardPosition]
    pending_bytes: int
    samples: int
    pairs: int
    prompts: int


def make_plan(dataset: Dataset, store: Store, job: ScoringJob) -> ScoringPlan:
    """Compare the shards of `scoring.splits` with the score files; one listing per split.

    Raises:
        DataError: a split that the dataset lacks.
        ConfigError: a template that cannot be filled.
    """
    prompts, position = build_prompts(dataset, job.scoring.templates)
    pending: dict[ShardPosition, int] = {}
    present: list[ShardPosition] = []
    samples = pending_bytes = 0
    for name in job.scoring.splits:
        keys = set(store.list_keys(f"{name}/"))
        split = open_split(dataset, name)
        samples += split.num_samples
        for number, shard in enumerate(split.shards):
            if job.score_key(name, shard.sha256) in keys:
                present.append((name, number))
            else:
                pending[name, number] = shard.samples
                pending_bytes += shard.bytes
    return ScoringPlan(pending, present, pending_bytes, samples, len(position), len(prompts))


def forget_quarantined(dataset: Dataset, store: Store, plan: ScoringPlan, job: ScoringJob) -> bool:
    """Delete `scores.json` and the score files that list unusable crops; whether there were any.

    Raises:
        DataError: a score file is damaged.
    """
    splits = {name: open_split(dataset, name) for name, _ in plan.present}
    found = []
    for name, position in plan.present:
        shard = SplitShard(splits[name], position)
        scores = open_shard_scores(store, shard, job.digests, cache=Path(job.cache))
        if quarantined_of(scores.header):
            found.append(job.score_key(name, shard.sha256))
    for key in ["scores.json", *found] if found else []:
        store.delete(key)
    return bool(found)


def check_not_taken(
    store: Store, wanted: dict[str, Any], splits: Sequence[str], *, retry_rejected: bool = False
) -> bool:
    """Whether `scores.json` is there already, with the same content.

    Args:
        store: score root.
        wanted: digests and temperature of this run, by their names in `scores.json`.
        splits: splits of this run.
        retry_rejected: one of an earlier state of the dataset counts as absent.

    Raises:
        ConflictError: it belongs to another dataset, scorer or temperature, or lacks a split.
    """
    try:
        store.size("scores.json")
    except NotFoundError:
        return False
    present = finished_manifest(store)
    others = [name for name, value in wanted.items() if present.get(name) != value]
    if others == ["dataset_digest"]:
        if retry_rejected:
            return False
        raise ConflictError(
            f"{store.url}/scores.json is of the dataset {present.get('dataset_digest')}, this one "
            f"is {wanted['dataset_digest']}; if pack --retry-rejected has changed it, repeat with "
            "--retry-rejected: shards that stayed keep their scores; else give another paths.scores"
        )
    for name in others:
        raise ConflictError(
            f"{store.url}/scores.json has {name} {present.get(name)}, this run has {wanted[name]}; "
            "give another paths.scores"
        )
    missing = [split for split in splits if split not in present["splits"]]
    if missing:
        raise ConflictError(
            f"{store.url} was finished for {', '.join(present['splits'])} and lacks "
            f"{', '.join(missing)}; delete its scores.json (score files are kept and skipped) and "
            "score all splits in one command"
        )
    return True


def known_settings(store: Store, job: ScoringJob) -> ScoreSettings | None:
    """The settings of the first run under this root; for a first run with `scoring.embeddings`,
    those of that root, with this run's device: only prompts are encoded. None: to be chosen.
    """
    stored = stored_settings(store, job)
    if stored is None and job.embeddings_manifest:
        theirs = ScoreSettings(**job.embeddings_manifest["settings"])
        ours = job.settings(theirs.batch_size, theirs.decode_threads, theirs.images_per_s)
        stored = store_settings(store, job, ours)
    return stored


class LocalPool:
    """`ShardScorer` in this process, two shards under way as in an actor."""

    retried = 0

    def __init__(self, scorer: ShardScorer) -> None:
        self._scorer = scorer

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results of the calls as they finish, in any order; one that fails cancels the rest."""
        with ThreadPoolExecutor(UNDER_WAY, thread_name_prefix="shard") as pool:
            try:
                futures = (pool.submit(getattr(self._scorer, name), *more) for name, more in calls)
                yield from (future.result() for future in as_completed(futures))
            finally:
                pool.shutdown(cancel_futures=True)


@dataclass
class ScoringTotals:
    """Results of all shards, summed up as they come.

    Attributes:
        quality: of the likelihoods.
        max_quarantined: crops that may be unusable before the run stops.
        scored, skipped: shards committed by this run, and those that were there.
        samples: split -> samples covered.
        images: crops encoded.
        quarantined: split -> uid in hex -> why its crop could not be used.
        seconds: where the workers' time went.
    """

    quality: QualityTotals
    max_quarantined: int
    scored: int = 0
    skipped: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    images: int = 0
    quarantined: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: PhaseSeconds = field(default_factory=PhaseSeconds)

    def add(self, result: ShardResult) -> None:
        """Add one shard.

        Raises:
            DataError: more crops are unusable than the run allows.
        """
        self.scored += result.created
        self.skipped += not result.created
        self.images += result.images
        self.samples[result.split] = self.samples.get(result.split, 0) + result.samples
        self.quality.add(result.quality)
        self.seconds += result.seconds
        if result.quarantined:
            here = self.quarantined.setdefault(result.split, {})
            here |= {f"{uid:016x}": why for uid, why in result.quarantined.items()}
            found = sum(map(len, self.quarantined.values()))
            if found > self.max_quarantined:
                uid, why = next(one for some in self.quarantined.values() for one in some.items())
                raise DataError(
                    f"{found} crops cannot be used, scoring.max_quarantined allows "
                    f"{self.max_quarantined}; the first is uid {uid}: {why}. Correct the photos "
                    "and pack again, or raise it"
                )
        if not result.identical:
            logger.warning(
                "shard %d of %s was scored twice with different last bits (unequal devices?); the "
                "first file is kept",
                result.shard,
                result.split,
            )


def _score(
    job: ScoringJob,
    plan: ScoringPlan,
    store: Store,
    known: ScoreSettings | None,
    totals: ScoringTotals,
) -> tuple[ScoreSettings, int]:
    """Score and check on Ray or in this process, showing progress.

    Returns:
        The settings that were used, and how many calls were handed out again.
    """
    if job.device == "cpu" and plan.pending and job.scoring.embeddings is None:
        logger.warning("SCORING ON THE CPU: fine for small models and data, slow for others")
    stop = Event()  # looked at between batches or twice a second
    with (
        set_on_stop_signal(stop),
        _open_pool(job, len(plan.pending), stop) as pool,
        set_on_stop_signal(stop),  # again: ray.init replaces the handlers
        Progress("score", total=plan.samples, unit="crops") as progress,
    ):
        settings = known or choose_settings(job, pool, store, plan)
        warn_of_ignored(settings, job)
        score_shards(pool, plan, settings, totals, progress)
        return settings, pool.retried


@contextlib.contextmanager
def _open_pool(job: ScoringJob, num_pending: int, stop: Event) -> Iterator[ActorPool | LocalPool]:
    if not job.scoring.use_ray or num_pending == 0:
        scorer = ShardScorer(job, stop=stop)
        try:
            yield LocalPool(scorer)
        finally:
            scorer.close()
        return
    actors = min(job.scoring.actors, num_pending)
    with ray_session(actors=actors, cpus_per_actor=job.scoring.cpus_per_actor, stop=stop):
        read = {"paths.dataset": f"{job.dataset}/dataset.json"}
        if job.scoring.embeddings is not None:
            read["scoring.embeddings"] = f"{job.scoring.embeddings}/scores.json"
        check_shared({"paths.scores": job.scores}, read, stop=stop)
        yield ActorPool(job, size=actors, stop=stop)


def choose_settings(
    job: ScoringJob, pool: ActorPool | LocalPool, store: Store, plan: ScoringPlan
) -> ScoreSettings:
    """Settings of a first run, from the config or a warm-up; stored for all that follow."""
    batch_size, decode_threads = job.scoring.batch_size, job.scoring.decode_threads
    images_per_s = None
    if (batch_size is None or decode_threads is None) and plan.pending:
        (found,) = pool.run([("warm_up", next(iter(plan.pending)))])
        logger.info("warm-up: %s", found)
        batch_size, decode_threads = found.batch_size, found.decode_threads
        images_per_s = round(found.images_per_s, 1)
    settings = job.settings(batch_size or 1, decode_threads or 1, images_per_s)
    return store_settings(store, job, settings)


def score_shards(
    pool: ActorPool | LocalPool,
    plan: ScoringPlan,
    settings: ScoreSettings,
    totals: ScoringTotals,
    progress: Progress,
) -> None:
    """Score the pending shards, check the others, and add them up.

    Raises:
        VlalError: what a worker raised; DataError where too many crops are unusable.
    """
    if plan.pending:
        list(pool.run([("prepare_text", (settings,))]))  # one encodes the prompts, all read them
    calls: list[Call] = [("score", (*where, settings)) for where in plan.pending]
    for result in pool.run([*calls, *(("check", where) for where in plan.present)]):
        totals.add(result)
        progress.advance(result.samples)


def planned(plan: ScoringPlan, job: ScoringJob, known: ScoreSettings | None) -> dict[str, object]:
    """What a run would do; `estimated_s` is None before a warm-up has predicted a rate."""
    pending = sum(plan.pending.values())
    rate = None if known is None else known.images_per_s
    return {
        "shards_pending": len(plan.pending),
        "shards_done": len(plan.present),
        "samples_pending": pending,
        "bytes_pending": plan.pending_bytes,
        "samples": plan.samples,
        "pairs": plan.pairs,
        "prompts": plan.prompts,
        "estimated_s": None if rate is None else round(pending / (rate * job.scoring.actors), 3),
        "scorer_digest": job.identity.digest,
    }


def closing(
    plan: ScoringPlan,
    job: ScoringJob,
    totals: ScoringTotals,
    settings: ScoreSettings,
    retried: int,
    *,
    seconds: float,
) -> dict[str, object]:
    """What a run did: counts, crops per second, shares of the workers' time, quality."""
    spent = asdict(totals.seconds)
    whole = sum(spent.values())
    return {
        "shards_scored": totals.scored,
        "shards_skipped": totals.skipped,
        "shards_retried": retried,
        "images": totals.images,
        "samples": plan.samples,
        "quarantined": totals.quarantined,
        "pairs": totals.quality.pairs,
        "prompts": plan.prompts,
        "images_per_s": round(totals.images / seconds, 1),
        "images_per_s_predicted_per_actor": settings.images_per_s,
        "shares": {k: round(v / whole, 3) for k, v in spent.items()} if whole else {},
        "batch_size": settings.batch_size,
        "decode_threads": settings.decode_threads,
        "device": settings.device,
        "temperature": settings.temperature,
        "quality": totals.quality.summary(),
        "scorer_digest": job.identity.digest,
    }
