"""The closing counts of `score_clip`, and those of `--plan`."""

from dataclasses import asdict
from typing import Any

from vlal_dist.scoring.identity import ScoreSettings
from vlal_dist.scoring.plan import Plan
from vlal_dist.scoring.run import Outcome
from vlal_dist.scoring.worker import ScoringJob


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
