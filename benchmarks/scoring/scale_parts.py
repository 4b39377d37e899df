"""What benchmarks/scoring/scale.py measures in processes of its own: driver, plan and closing file.

No crop is scored here: actors answer at once, with the quality of one real small shard.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event

import numpy as np

from benchmarks.scoring.scale_data import IDENTITY, SCORER, SHARD_SAMPLES
from benchmarks.scoring.scale_memory import family, status_mb
from vlal_dist.config.sections import ScoringConfig
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.format.scores import finished_manifest, write_scores_manifest
from vlal_dist.observability.logs import Progress
from vlal_dist.scoring import ray_cluster
from vlal_dist.scoring.clip import PhaseSeconds
from vlal_dist.scoring.driver import ScoringPlan, ScoringTotals, closing, make_plan, score_shards
from vlal_dist.scoring.embed import SplitShard
from vlal_dist.scoring.identity import ScoreSettings, ScoringJob
from vlal_dist.scoring.quality import QualityTotals, ShardQuality, check_shard, type_names
from vlal_dist.scoring.ray_cluster import ray_session
from vlal_dist.scoring.shard_task import ShardResult
from vlal_dist.storage.store import open_store

ACTORS = 2
SETTINGS = ScoreSettings(256, 1, 1, "fp32", "cpu", False, 0.01)
Result = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class EmptyJob(ScoringJob):
    """A job whose shards all have the same quality."""

    quality: ShardQuality | None


class EmptyActor(ray_cluster.ScoringActor):
    """Opens nothing, scores nothing, answers at once."""

    job: EmptyJob

    def open(self) -> int:
        """The process id."""
        self.scorer = self  # type: ignore[assignment]
        return os.getpid()

    def prepare_text(self, settings: object) -> int:
        """The process id."""
        return os.getpid()

    def score(self, split: str, shard: int, settings: ScoreSettings) -> ShardResult:
        """A result of real size."""
        return result_of(split, shard, self.job.quality)


def result_of(
    split: str, shard: int, quality: ShardQuality, *, unusable: bool = False
) -> ShardResult:
    """What an actor answers of a shard that it has just scored."""
    quarantined = {shard: "a crop cannot be decoded: image file is truncated"} if unusable else {}
    samples, seconds = quality.crops, PhaseSeconds(0.01, 0.02, 0.01, 0.2, 0.01)
    return ShardResult(split, shard, samples, samples, True, True, quality, quarantined, seconds)


def real_quality(small: Path) -> ShardQuality:
    """Of the first training shard, read back and measured as the program does."""
    dataset = open_dataset(str(small / "dataset"), cache=small / "cache")
    store = open_store(str(small / "scores"))
    manifest = finished_manifest(store)
    quality, _ = check_shard(
        dataset,
        SplitShard(open_split(dataset, "train"), 0),
        store=store,
        manifest=manifest,
        temperature=manifest["temperature"],
        cache=small / "cache",
    )
    return quality


def tiled(quality: ShardQuality, pairs: int) -> ShardQuality:
    """The quality of a larger shard: the annotated pairs of a small one repeated."""
    return replace(
        quality,
        similarity=np.resize(quality.similarity, pairs),
        positive=np.resize(quality.positive, pairs),
        kind=np.resize(quality.kind, pairs),
    )


def drive(small: Path, shards: int, *, pairs: int | None) -> Result:
    """Score `shards` empty shards on two real ray_cluster.

    Args:
        small: made by `score_scale_data.make_small`.
        shards: how many.
        pairs: annotated pairs of each; None: as the real small shard has.
    """
    quality = real_quality(small)
    if pairs is not None:
        quality = tiled(quality, pairs)
    totals = ScoringTotals(QualityTotals(_types(small)), max_quarantined=0)
    ray_cluster.ScoringActor = EmptyActor  # type: ignore[misc]
    with ray_session(actors=ACTORS, cpus_per_actor=0.5):
        pool = ray_cluster.ActorPool(_job(quality), size=ACTORS, stop=Event())
        pids: set[int] = set()
        for number in range(100_000):  # until every actor has answered
            pids |= set(pool.run([("prepare_text", (number,))]))
            if len(pids) == ACTORS:
                break
        ready_mb, started, cpu = status_mb("self", "VmHWM"), time.monotonic(), time.process_time()
        plan = ScoringPlan({("train", shard): 1 for shard in range(shards)}, [], 0, shards, 0, 0)
        progress = Progress("score", total=shards, unit="crops")
        score_shards(pool, plan, SETTINGS, totals, progress)
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        assert totals.scored == shards and pool.retried == 0
        return {
            "shards": shards,
            "pairs": len(quality.similarity),
            "seconds": seconds,
            "us": seconds / shards * 1e6,
            "cpu_s": cpu,
            "cpu_us": cpu / shards * 1e6,
            "ready_mb": ready_mb,
            "peak_mb": status_mb("self", "VmHWM"),
            "actor_peak_mb": max(status_mb(pid, "VmHWM") for pid in pids),
            **{f"{name}_mb": mb for name, mb in _ray_mb(pids).items()},
        }


def plan(root: Path, scores: Path, cache: Path) -> Result:
    """Compare all shards with the score files."""
    dataset, store = open_dataset(str(root), cache=cache), open_store(str(scores))
    ready_mb, started = status_mb("self", "VmHWM"), time.monotonic()
    made = make_plan(dataset, store, _job(None))
    seconds = time.monotonic() - started
    return {
        "pending": len(made.pending),
        "present": len(made.present),
        "seconds": seconds,
        "ready_mb": ready_mb,
        "peak_mb": status_mb("self", "VmHWM"),
    }


def close(root: Path, small: Path, cache: Path, *, every: int) -> Result:
    """Sum up the results of all shards, and write `scores.json`, as the program's end does.

    Args:
        root: made by `score_scale_data.make_many`.
        small: made by `score_scale_data.make_small`.
        cache: local folder.
        every: one of so many shards has an unusable crop; 0: none has.
    """
    dataset, quality = open_dataset(str(root), cache=cache), real_quality(small)
    shards = int(dataset.manifest["splits"]["train"]["shards"])
    totals = ScoringTotals(QualityTotals(_types(small)), max_quarantined=shards)
    store = open_store(str(root.with_name(f"{root.name}-closed")))
    store.delete("scores.json")
    ready_mb, started = status_mb("self", "VmHWM"), time.monotonic()
    for shard in range(shards):
        unusable = every > 0 and shard % every == 0
        totals.add(result_of("train", shard, quality, unusable=unusable))
    added = time.monotonic()
    splits = {
        name: {"samples": count, "shards": len(open_split(dataset, name).shards)}
        for name, count in totals.samples.items()
    }
    found = {"splits": splits, "quarantined": totals.quarantined, "settings": asdict(SETTINGS)}
    write_scores_manifest(store, {"scorer_digest": SCORER, **found})
    done = ScoringPlan({}, [], 0, shards * SHARD_SAMPLES, 0, 0)
    json.dumps(closing(done, _job(quality), totals, SETTINGS, 0, seconds=1.0), indent=2)
    return {
        "quarantined": sum(map(len, totals.quarantined.values())),
        "add_us": (added - started) / shards * 1e6,
        "seconds": time.monotonic() - added,
        "bytes": store.size("scores.json"),
        "ready_mb": ready_mb,
        "peak_mb": status_mb("self", "VmHWM"),
    }


def _ray_mb(actor_pids: set[int]) -> Result:
    """Ray's own processes: all together, and its control store, which remembers calls."""
    found = {pid: status_mb(pid, "VmRSS") for pid in family(os.getpid(), but=actor_pids)}
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in found}
    store = sum(mb for pid, mb in found.items() if names[pid].endswith(b"gcs_server"))
    return {"ray": sum(found.values()), "gcs": store}


def _types(small: Path) -> tuple[str, ...]:
    dataset = open_dataset(str(small / "dataset"), cache=small / "cache")
    return type_names(dataset.vocabulary)


def _job(quality: ShardQuality | None) -> EmptyJob:
    return EmptyJob(
        scoring=ScoringConfig(),
        dataset="",
        scores="",
        cache="",
        identity=IDENTITY,
        device="cpu",
        temperature=0.01,
        quality=quality,
    )
