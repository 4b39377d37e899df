"""Definitions of all Prometheus metrics: name, kind, labels, meaning.

Names are as exported. Labels that identify the exporter (`run`, `role`, `rank`, `node`) come from
discovery. docs/operations.md shows these tables, which a test compares.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One metric.

    Attributes:
        kind: its Prometheus type.
        text: help text, with the unit where the name has none.
        labels: label -> its values; empty: values known only at run time.
        buckets: upper bounds of a histogram.
        field: of `LOADER`, its key in `TrainLoader.numbers`.
    """

    kind: Literal["counter", "gauge", "histogram", "summary"]
    text: str
    labels: Mapping[str, tuple[str, ...]] = {}
    buckets: tuple[float, ...] = ()
    field: str = ""


counter, gauge = partial(Metric, "counter"), partial(Metric, "gauge")
histogram, summary = partial(Metric, "histogram"), partial(Metric, "summary")

Readings = Mapping[tuple[str, ...], float]
"""(name of a metric, *values of its labels) -> value."""

RUN_STATES = ("init", "restoring", "training", "evaluating", "saving", "stopping", "done", "failed")
LOSS_TERMS = ("total", "positive", "negative", "feasible", "infeasible")
TERM_KINDS = ("positive", "negative", "feasible_negated", "infeasible_negated", "ignored")
ATTRIBUTE_STATUS = ("scored", "no_positive", "no_negative", "unannotated")
RESUME_KINDS = ("fresh", "exact", "resharded", "fallback")
STOPS = ("SIGTERM", "SIGINT", "SIGUSR1", "launcher_gone")
SAVE_FAILURES = ("disk_full", "io", "other")
S3_REASONS = (
    "throttled", "error", "unreachable", "timeout", "truncated", "altered", "commit", "redirected",
)  # fmt: skip
PACK_RESULTS = ("written", "missing", "bad_image", "bad_box", "other")
TRACKERS = ("tensorboard", "wandb", "mlflow")
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WAIT_BUCKETS = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
SAVE_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)

LOADER: dict[str, Metric] = {
    "vlal_loader_samples_total": counter("Samples read.", field="samples"),
    "vlal_loader_sample_bytes_total": counter("Bytes of samples read.", field="sample_bytes"),
    "vlal_loader_read_seconds_total": counter(
        "Seconds of reading and checking, waits for fetches included; all threads.",
        field="read_seconds",
    ),
    "vlal_loader_decode_seconds_total": counter(
        "Seconds of decoding and resizing, all threads.", field="decode_seconds"
    ),
    "vlal_loader_label_seconds_total": counter(
        "Seconds of making labels and weights, all threads.", field="label_seconds"
    ),
    "vlal_loader_ready_steps": gauge(
        "Steps that were ready when the last one was taken.", field="ready_steps"
    ),
    "vlal_loader_fetches_total": counter("Ranged reads of remote shards.", field="fetches"),
    "vlal_loader_fetched_bytes_total": counter("Bytes of these reads.", field="fetched_bytes"),
    "vlal_loader_fetch_seconds_total": counter(
        "Seconds of these reads, all threads.", field="fetch_seconds"
    ),
    "vlal_loader_refetched_total": counter(
        "Samples that failed a check and were read again.", field="refetched"
    ),
    "vlal_loader_damaged_total": counter("Samples that failed the check again.", field="damaged"),
    "vlal_loader_cache_hits_total": counter("Ranges found in the disk cache.", field="cache_hits"),
    "vlal_loader_cache_misses_total": counter(
        "Ranges not found in the disk cache.", field="cache_misses"
    ),
    "vlal_loader_cache_evictions_total": counter(
        "Ranges removed from the disk cache by this rank.", field="cache_evictions"
    ),
    "vlal_loader_cache_failed_writes_total": counter(
        "Ranges not written to the disk cache, by errors.", field="cache_failed_writes"
    ),
    "vlal_loader_cache_bytes": gauge(
        "Bytes in the disk cache, of all ranks of the node.", field="cache_bytes"
    ),
}
"""What the loader of a rank did; published at log intervals."""

STORAGE: dict[str, Metric] = {
    "vlal_s3_requests_total": counter("HTTP requests to S3, repetitions included."),
    "vlal_s3_retries_total": counter("Requests repeated, by reason.", {"reason": S3_REASONS}),
    "vlal_s3_bytes_total": counter(
        "Bytes of objects received and of accepted PUTs.", {"direction": ("in", "out")}
    ),
    "vlal_disk_free_bytes": gauge(
        "Free bytes on the disk of paths.cache, or of a local paths.run.",
        {"mount": ("cache", "run")},
    ),
}
"""Storage of a process, read at each scrape, so that they move while a step waits for the store."""

TRAIN: dict[str, Metric] = {
    "vlal_build_info": gauge(
        "1; versions as labels.", {"version": (), "torch": (), "deepspeed": (), "kernel": ()}
    ),
    "vlal_run_state": gauge("1 for the current state.", {"state": RUN_STATES}),
    "vlal_train_steps_total": counter("Optimizer steps of this start."),
    "vlal_train_samples_total": counter("Rows of this rank in these steps."),
    "vlal_train_epoch": gauge("Epoch, from 0."),
    "vlal_train_global_step": gauge("Steps since the run began."),
    "vlal_train_step_duration_seconds": histogram(
        "Duration of a step, waiting for the loader included.", buckets=STEP_BUCKETS
    ),
    "vlal_loader_wait_seconds": histogram(
        "Wait of this rank for its next batch.", buckets=WAIT_BUCKETS
    ),
    "vlal_train_compute_seconds": summary(
        "Passes of a step on this rank, without waits for others; none with ZeRO 1, 2."
    ),
    "vlal_train_allreduce_seconds": summary(
        "Gradient sum over ranks, waits included; none with ZeRO 1, 2."
    ),
    "vlal_train_last_step_timestamp_seconds": gauge(
        "When a step last ended, or training began or continued."
    ),
    "vlal_train_loss": gauge(
        "Mean loss of a row over all ranks and the last log interval.", {"term": LOSS_TERMS}
    ),
    "vlal_train_learning_rate": gauge("Learning rate.", {"group": ("backbone", "head")}),
    "vlal_train_grad_norm": gauge(
        "Norm of the summed gradient of the last logged step; 0 with ZeRO 1 and 2."
    ),
    "vlal_train_nonfinite_steps_total": counter(
        "Steps refused because a loss or the gradient was not finite."
    ),
    "vlal_train_ignored_attributes": gauge(
        "Ignored attributes of a row, mean over all ranks and the last log interval."
    ),
    "vlal_train_label_terms_total": counter(
        "Pairs of row and attribute of this rank by term.", {"kind": TERM_KINDS}
    ),
    "vlal_train_ledger_visits": gauge(
        "Visits of this epoch in the ledger, all ranks.", {"kind": ("trained", "left_out")}
    ),
    "vlal_train_quarantined_samples": gauge("Damaged samples on the run's list, all ranks."),
    "vlal_eval_map_ratio": gauge(
        "mAP of a group at the last validation, 0-1.", {"split": (), "group": ()}
    ),
    "vlal_eval_attributes": gauge(
        "Attributes at the last validation; mAP is the mean of the scored.",
        {"status": ATTRIBUTE_STATUS},
    ),
    "vlal_checkpoint_duration_seconds": histogram(
        "Duration of writing a checkpoint, on rank 0.", buckets=SAVE_BUCKETS
    ),
    "vlal_checkpoint_size_bytes": gauge("Bytes of the last checkpoint."),
    "vlal_checkpoint_last_success_timestamp_seconds": gauge(
        "When this start last finished a checkpoint; 0: never."
    ),
    "vlal_checkpoint_interval_seconds": gauge("Longest time between checkpoints since this start."),
    "vlal_checkpoint_failures_total": counter(
        "Checkpoints and best models that could not be written.", {"reason": SAVE_FAILURES}
    ),
    "vlal_resume_total": counter(
        "How this start began: fresh, exact, resharded (another number of ranks), fallback (the "
        "newest checkpoint was damaged).",
        {"kind": RESUME_KINDS},
    ),
    "vlal_signal_received_total": counter(
        "What stopped this rank: a signal, or a launcher that was gone.", {"signal": STOPS}
    ),
    "vlal_tracker_dropped_total": counter(
        "Records that a tracker did not take in time, on rank 0.", {"tracker": TRACKERS}
    ),
}
"""What a training rank exports."""

SCORE: dict[str, Metric] = {
    "ray_vlal_score_shards_pending": gauge(
        "Shards that this job still has to score or check.", {"run": ()}
    ),
    "ray_vlal_score_shards_total": counter(
        "Shards that this job committed, found done, or assigned again.",
        {"run": (), "result": ("committed", "skipped", "retried")},
    ),
    "ray_vlal_score_images_total": counter(
        "Crops encoded, and unusable crops.", {"run": (), "result": ("ok", "failed")}
    ),
    "ray_vlal_score_seconds_total": counter(
        "Seconds of the actors by phase, summed over threads.",
        {"run": (), "phase": ("fetch", "decode", "copy", "encode", "write")},
    ),
}
"""What the driver of a scoring job exports through Ray, per shard; `run` is its score root."""

PACK: dict[str, Metric] = {
    "vlal_pack_instances_total": counter(
        "Instances of finished shards; at the end all rows of the input.",
        {"run": (), "result": PACK_RESULTS},
    ),
    "vlal_pack_shards_total": counter(
        "Finished shards: written, or skipped because an earlier run wrote them.",
        {"run": (), "result": ("written", "skipped")},
    ),
    "vlal_pack_bytes_total": counter("Bytes of the tars of these shards.", {"run": ()}),
}
"""What pack exports through node_exporter, per shard; `run` is its dataset root."""

JOB: dict[str, Metric] = {
    "vlal_job_last_success_timestamp_seconds": gauge(
        "When the program last ended with exit code 0; 0: never.", {"job_name": (), "run": ()}
    ),
    "vlal_job_duration_seconds": gauge("Duration of its last run.", {"job_name": (), "run": ()}),
    "vlal_job_exit_code": gauge(
        "Exit code of its last run; 0 done, 75 stopped and resumable.", {"job_name": (), "run": ()}
    ),
}
"""What a program exports through node_exporter when it ends; `run` is the root it writes."""
