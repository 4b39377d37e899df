"""The scoring driver: plan the shards that are left, hand them to workers, sum up the results."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from vlal_dist.data.format.dataset import Dataset, open_split
from vlal_dist.data.format.mapped_scores import open_scores
from vlal_dist.data.format.scores import finished_manifest, quarantined_of, score_key
from vlal_dist.errors import ConfigError, ConflictError, DataError, NotFoundError
from vlal_dist.scoring.clip import Seconds
from vlal_dist.scoring.embed import shard_rows
from vlal_dist.scoring.identity import ScoreSettings, store_settings, stored_settings
from vlal_dist.scoring.quality import QualityTotals
from vlal_dist.scoring.ray_cluster import UNDER_WAY, Call
from vlal_dist.scoring.shard_task import ShardResult
from vlal_dist.scoring.text_bank import build_prompts
from vlal_dist.scoring.worker import ScoringJob, ShardScorer
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)

Task = tuple[str, int]
"""Split name and position of a shard in it."""


@dataclass(frozen=True)
class Plan:
    """What there is to score.

    Attributes:
        pending: shards without a score file, in order, with their samples.
        present: shards that have one, in order.
        pending_bytes: size of the tars without.
        samples: samples of all shards.
        pairs: feasible (object, attribute) pairs.
        prompts: different prompts.
    """

    pending: dict[Task, int]
    present: list[Task]
    pending_bytes: int
    samples: int
    pairs: int
    prompts: int


def make_plan(
    dataset: Dataset,
    store: Store,
    splits: Sequence[str],
    templates: Sequence[str],
    *,
    scorer_digest: str,
) -> Plan:
    """Compare the shards of `splits` with the score files of `store`; one listing per split.

    Raises:
        DataError: a split that the dataset lacks.
        ConfigError: a template that cannot be filled.
    """
    prompts = build_prompts(dataset.vocabulary, dataset.feasible, templates=templates)
    pending: dict[Task, int] = {}
    present: list[Task] = []
    samples = pending_bytes = 0
    for name in splits:
        keys = set(store.list_keys(f"{name}/"))
        split = open_split(dataset, name)
        samples += split.num_samples
        for position, shard in enumerate(split.shards):
            key = score_key(name, shard_sha256=shard.sha256, scorer_digest=scorer_digest)
            if key in keys:
                present.append((name, position))
            else:
                pending[name, position] = shard.samples
                pending_bytes += shard.bytes
    return Plan(pending, present, pending_bytes, samples, len(prompts.position), len(prompts.text))


def check_not_taken(store: Store, wanted: Mapping[str, object], splits: Sequence[str]) -> bool:
    """Whether `scores.json` is there already and says the same.

    Args:
        store: score root.
        wanted: digests and temperature of this run, by their names in `scores.json`.
        splits: splits of this run.

    Raises:
        ConflictError: it belongs to another dataset, scorer or temperature, or lacks a split.
    """
    try:
        present = json.loads(store.read("scores.json"))
    except NotFoundError:
        return False
    for name, value in wanted.items():
        if present.get(name) != value:
            raise ConflictError(
                f"{store.url}/scores.json has {name} {present.get(name)}, this run has {value}; "
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


def read_embeddings_manifest(store: Store, *, embedder_digest: str) -> dict[str, Any]:
    """`scores.json` of the root whose embeddings are to be used again.

    Args:
        store: that score root.
        embedder_digest: of this run's model, preprocessing and precision.

    Raises:
        DataError: it is not finished.
        ConfigError: its embeddings are another model's.
    """
    manifest = finished_manifest(store)
    found = manifest.get("embedder_digest")
    if found != embedder_digest:
        raise ConfigError(
            f"scoring.embeddings {store.url} has embedder_digest {found}, this run has "
            f"{embedder_digest}: another model, weights, preprocessing or precision; give those it "
            "was scored with, or score the images again"
        )
    return manifest


def forget_quarantined(
    dataset: Dataset, store: Store, plan: Plan, *, header: Mapping[str, Any], cache: Path
) -> Plan:
    """Delete the score files that list unusable crops, and `scores.json` if there is one.

    Args:
        dataset: the opened dataset.
        store: score root.
        plan: what is present.
        header: expected digests.
        cache: local folder for copies of remote score files.

    Returns:
        The plan with their shards pending again.

    Raises:
        DataError: a score file is damaged.
    """
    doomed: dict[str, Task] = {}
    digest = str(header["scorer_digest"])
    for name, position in plan.present:
        split = open_split(dataset, name)
        rows, sha256 = shard_rows(split, position), split.shards[position].sha256
        uid = split.index.uid[rows.start : rows.stop]
        scores = open_scores(
            store, name, shard_sha256=sha256, uid=uid, manifest=header, cache=cache
        )
        if quarantined_of(scores.header):
            doomed[score_key(name, shard_sha256=sha256, scorer_digest=digest)] = (name, position)
    for key in ["scores.json", *doomed] if doomed else []:
        store.delete(key)
    shards = {task: open_split(dataset, task[0]).shards[task[1]] for task in doomed.values()}
    return replace(
        plan,
        pending=plan.pending | {task: shard.samples for task, shard in shards.items()},
        present=[task for task in plan.present if task not in shards],
        pending_bytes=plan.pending_bytes + sum(shard.bytes for shard in shards.values()),
    )


def stored_settings_of(store: Store, job: ScoringJob) -> ScoreSettings | None:
    """Those of the first run under this root; errors as `stored_settings`."""
    return stored_settings(
        store, scorer_digest=job.scorer_digest, temperature=job.temperature, device=job.device
    )


def known_settings(store: Store, job: ScoringJob) -> ScoreSettings | None:
    """Those of the first run under this root; or, for a re-scoring, those of the root whose
    embeddings are used, with this run's device: only prompts are encoded. They are stored here.
    """
    stored = stored_settings_of(store, job)
    if stored is None and job.embeddings is not None:
        values = json.loads(job.embeddings_manifest)["settings"]
        stored = replace(
            ScoreSettings(**values),
            temperature=job.temperature,
            threads=job.threads,
            device=job.device,
            compiled=job.compiled,
        )
        stored = store_settings(store, stored, scorer_digest=job.scorer_digest)
    return stored


def new_settings(
    job: ScoringJob,
    workers: "Workers",
    store: Store,
    *,
    first: Task | None,
    batch_size: int | None,
    decode_threads: int | None,
) -> ScoreSettings:
    """Settings of a first run: those given, or found by a warm-up; stored for all that follow.

    Args:
        job: what the workers know.
        workers: one of them warms up.
        store: score root.
        first: the shard to warm up on; None: nothing is to be scored.
        batch_size, decode_threads: given: not chosen.
    """
    images_per_s = None
    if (batch_size is None or decode_threads is None) and first is not None:
        (found,) = workers.run([("warm_up", (*first, batch_size, decode_threads))])
        batch_size, decode_threads = found.batch_size, found.decode_threads
        images_per_s = round(found.images_per_s, 1)
        logger.info("warm-up: %s", found)
    wanted = ScoreSettings(
        batch_size=batch_size or 1,
        threads=job.threads,
        decode_threads=decode_threads or 1,
        precision=job.precision,
        device=job.device,
        compiled=job.compiled,
        temperature=job.temperature,
        images_per_s=images_per_s,
    )
    return store_settings(store, wanted, scorer_digest=job.scorer_digest)


class Workers(Protocol):
    """Who does the work: `actors.ActorPool`, or `LocalWorkers`."""

    @property
    def retried(self) -> int:
        """Calls given out again after a lost worker."""

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results of the calls as they finish, in any order."""


class LocalWorkers:
    """This process alone, two shards under way as in an actor."""

    retried = 0

    def __init__(self, scorer: ShardScorer) -> None:
        self._scorer = scorer

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """See `Workers.run`."""
        with ThreadPoolExecutor(UNDER_WAY, thread_name_prefix="shard") as pool:
            under_way: set[Future[Any]] = set()
            try:
                for method, arguments in calls:
                    under_way.add(pool.submit(getattr(self._scorer, method), *arguments))
                    if len(under_way) >= UNDER_WAY:
                        done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                        yield from (one.result() for one in done)
                while under_way:
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    yield from (one.result() for one in done)
            finally:
                for one in under_way:
                    one.cancel()


@dataclass
class Outcome:
    """What became of all shards, summed up as they come.

    Attributes:
        quality: of the likelihoods.
        allowed: crops that may be unusable before the run stops.
        scored, skipped: shards committed by this run, and those that were there.
        samples: split -> samples covered.
        images: crops encoded.
        quarantined: split -> uid in hex -> why its crop could not be used.
        spent: where the workers' time went.
    """

    quality: QualityTotals
    allowed: int
    scored: int = 0
    skipped: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    images: int = 0
    quarantined: dict[str, dict[str, str]] = field(default_factory=dict)
    spent: Seconds = field(default_factory=Seconds)

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
        for name, seconds in asdict(result.seconds).items():
            setattr(self.spent, name, getattr(self.spent, name) + seconds)
        if result.quarantined:
            here = self.quarantined.setdefault(result.split, {})
            here |= {f"{uid:016x}": why for uid, why in result.quarantined.items()}
            self._check_quarantined()
        if not result.identical:
            logger.warning(
                "shard %d of %s was scored twice with different last bits (unequal devices?); the "
                "first file stands",
                result.shard,
                result.split,
            )

    def _check_quarantined(self) -> None:
        found = sum(map(len, self.quarantined.values()))
        if found > self.allowed:
            uid, why = next(one for some in self.quarantined.values() for one in some.items())
            raise DataError(
                f"{found} crops cannot be used, scoring.max_quarantined allows {self.allowed}; "
                f"the first is uid {uid}: {why}. Correct the photos and pack again, or raise it"
            )


def score_all(
    workers: Workers,
    *,
    pending: Sequence[Task],
    present: Sequence[Task],
    settings: ScoreSettings,
    outcome: Outcome,
    advance: Callable[[int], None],
) -> None:
    """Check the shards that have a score file, score the others, sum up.

    Args:
        workers: who does it.
        pending, present: shards without and with a score file.
        settings: shared by all workers.
        outcome: added to.
        advance: told the samples of each shard that is done.

    Raises:
        VlalError: what a worker raised; DataError where too many crops are unusable.
    """
    if pending:
        list(workers.run([("prepare_text", (settings,))]))  # one encodes the prompts, all read them
    calls: list[Call] = [("score", (*task, settings)) for task in pending]
    for result in workers.run([*calls, *(("check", task) for task in present)]):
        outcome.add(result)
        advance(result.samples)


def planned(
    plan: Plan, job: ScoringJob, known: ScoreSettings | None, *, actors: int
) -> dict[str, object]:
    """What a run would do; seconds are None where no warm-up foretold a rate."""
    pending = sum(plan.pending.values())
    per_s = None if known is None or known.images_per_s is None else known.images_per_s * actors
    return {
        "shards_pending": len(plan.pending),
        "shards_done": len(plan.present),
        "samples_pending": pending,
        "bytes_pending": plan.pending_bytes,
        "samples": plan.samples,
        "pairs": plan.pairs,
        "prompts": plan.prompts,
        "estimated_s": None if per_s is None else round(pending / per_s, 3),
        "scorer_digest": job.scorer_digest,
    }


def closing(
    plan: Plan, outcome: Outcome, settings: ScoreSettings, retried: int, seconds: float, digest: str
) -> dict[str, object]:
    """What a run did: counts, crops per second, shares of the workers' time, quality."""
    spent = asdict(outcome.spent)
    whole = sum(spent.values())
    shares: dict[str, Any] = {k: round(v / whole, 3) for k, v in spent.items()} if whole else {}
    return {
        "shards_scored": outcome.scored,
        "shards_skipped": outcome.skipped,
        "shards_retried": retried,
        "images": outcome.images,
        "samples": plan.samples,
        "quarantined": outcome.quarantined,
        "pairs": outcome.quality.pairs,
        "prompts": plan.prompts,
        "images_per_s": round(outcome.images / seconds, 1),
        "images_per_s_predicted_per_actor": settings.images_per_s,
        "shares": shares,
        "batch_size": settings.batch_size,
        "decode_threads": settings.decode_threads,
        "device": settings.device,
        "temperature": settings.temperature,
        "quality": outcome.quality.summary(),
        "scorer_digest": digest,
    }
