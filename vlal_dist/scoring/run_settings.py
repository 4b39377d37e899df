"""The settings of a run: those that stand under its root already, or new ones for all to come."""

import json
import logging
from dataclasses import replace

from vlal_dist.scoring.identity import ScoreSettings, store_settings, stored_settings
from vlal_dist.scoring.plan import Task
from vlal_dist.scoring.run import Workers
from vlal_dist.scoring.worker import ScoringJob
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)


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
    workers: Workers,
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
