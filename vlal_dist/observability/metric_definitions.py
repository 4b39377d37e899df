"""Every metric of this project: name, kind, labels, meaning. One place, so that none goes stale.

Names are as a scrape shows them. Labels that say who exports (`run`, `role`, `rank`, `node`) come
from discovery. docs/operations.md shows these tables; a test holds it to them.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One metric.

    Attributes:
        kind: of Prometheus.
        text: what it says, with the unit where the name has none.
        labels: label -> its values; none listed: few, but known only to the run.
        buckets: upper bounds of a histogram.
    """

    kind: Literal["counter", "gauge", "histogram", "summary"]
    text: str
    labels: Mapping[str, tuple[str, ...]] = {}
    buckets: tuple[float, ...] = ()


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
    "vlal_loader_wait_seconds": Metric(
        "histogram", "Waiting of this rank for its next batch.", buckets=WAIT_BUCKETS
    ),
    "vlal_loader_samples_total": Metric("counter", "Samples read."),
    "vlal_loader_sample_bytes_total": Metric("counter", "Bytes of their tar ranges."),
    "vlal_loader_read_seconds_total": Metric(
        "counter", "Reading and checking, waits for fetches included; all threads."
    ),
    "vlal_loader_decode_seconds_total": Metric("counter", "Decoding and resizing, all threads."),
    "vlal_loader_label_seconds_total": Metric(
        "counter", "Making labels and weights of batches, all threads."
    ),
    "vlal_loader_ready_steps": Metric("gauge", "Steps that were ready when one was taken."),
    "vlal_loader_fetches_total": Metric("counter", "Ranged reads of remote shards."),
    "vlal_loader_fetched_bytes_total": Metric("counter", "Bytes of them."),
    "vlal_loader_fetch_seconds_total": Metric("counter", "Seconds in them, all threads."),
    "vlal_loader_refetched_total": Metric(
        "counter", "Samples that failed a check and were read once more."
    ),
    "vlal_loader_damaged_total": Metric("counter", "Samples that failed it again."),
    "vlal_loader_cache_hits_total": Metric("counter", "Parts found in the disk cache."),
    "vlal_loader_cache_misses_total": Metric("counter", "Parts not found there."),
    "vlal_loader_cache_evictions_total": Metric("counter", "Parts removed from it by this rank."),
    "vlal_loader_cache_failed_writes_total": Metric(
        "counter", "Parts that could not be written to it."
    ),
    "vlal_loader_cache_bytes": Metric("gauge", "Bytes in it, of all ranks of the node."),
}
"""What the stream of a rank did; published at log intervals, but for the waiting."""

STORAGE: dict[str, Metric] = {
    "vlal_s3_requests_total": Metric("counter", "HTTP requests to S3, repetitions included."),
    "vlal_s3_retries_total": Metric(
        "counter", "Requests repeated, and why.", {"reason": S3_REASONS}
    ),
    "vlal_s3_bytes_total": Metric(
        "counter", "Bytes of objects received and of accepted PUTs.", {"direction": ("in", "out")}
    ),
    "vlal_disk_free_bytes": Metric(
        "gauge", "Free on the disk of paths.cache, or of a local paths.run.",
        {"mount": ("cache", "run")},
    ),
}  # fmt: skip
"""Read when a scrape comes, so that they move while a step waits for the store."""

TRAIN: dict[str, Metric] = {
    "vlal_build_info": Metric(
        "gauge", "1; versions, as labels.",
        {"version": (), "torch": (), "deepspeed": (), "kernel": ()},
    ),
    "vlal_run_state": Metric("gauge", "1 for the present state.", {"state": RUN_STATES}),
    "vlal_train_steps_total": Metric("counter", "Optimizer steps of this start."),
    "vlal_train_samples_total": Metric("counter", "Rows of this rank in them."),
    "vlal_train_epoch": Metric("gauge", "Epoch, from 0."),
    "vlal_train_global_step": Metric("gauge", "Steps since the run began."),
    "vlal_train_step_duration_seconds": Metric(
        "histogram", "A step, waiting for the loader included.", buckets=STEP_BUCKETS
    ),
    "vlal_train_compute_seconds": Metric(
        "summary", "A step's passes on this rank, without waiting for others; none with ZeRO 1, 2."
    ),
    "vlal_train_allreduce_seconds": Metric(
        "summary", "Summing its gradients over ranks, waiting included; none with ZeRO 1 and 2."
    ),
    "vlal_train_last_step_timestamp_seconds": Metric(
        "gauge", "When a step last ended, or training began or went on."
    ),
    "vlal_train_loss": Metric(
        "gauge", "Mean loss of a row over all ranks and the last log interval.",
        {"term": LOSS_TERMS},
    ),
    "vlal_train_learning_rate": Metric(
        "gauge", "Learning rate.", {"group": ("backbone", "head")}
    ),
    "vlal_train_grad_norm": Metric(
        "gauge", "Norm of the summed gradient of the last logged step; 0 with ZeRO 1 and 2."
    ),
    "vlal_train_nonfinite_steps_total": Metric(
        "counter", "Steps refused because a loss or the gradient was not finite."
    ),
    "vlal_train_ignored_attributes": Metric(
        "gauge", "Ignored attributes of a row, mean over all ranks and the last log interval."
    ),
    "vlal_train_label_terms_total": Metric(
        "counter", "Pairs of row and attribute of this rank by term.", {"kind": TERM_KINDS}
    ),
    "vlal_train_ledger_visits": Metric(
        "gauge", "Visits of this epoch in the books of the run, all ranks.",
        {"kind": ("trained", "left_out")},
    ),
    "vlal_train_quarantined_samples": Metric(
        "gauge", "Damaged samples on the run's list, all ranks."
    ),
    "vlal_eval_map_ratio": Metric(
        "gauge", "mAP of a group at the last validation, 0-1.", {"split": (), "group": ()}
    ),
    "vlal_eval_attributes": Metric(
        "gauge", "Attributes at the last validation; mAP is the mean of the scored.",
        {"status": ATTRIBUTE_STATUS},
    ),
    "vlal_checkpoint_duration_seconds": Metric(
        "histogram", "Writing a checkpoint, on rank 0.", buckets=SAVE_BUCKETS
    ),
    "vlal_checkpoint_size_bytes": Metric("gauge", "Bytes of the last checkpoint."),
    "vlal_checkpoint_last_success_timestamp_seconds": Metric(
        "gauge", "When this start last finished a checkpoint; 0: not yet."
    ),
    "vlal_checkpoint_interval_seconds": Metric(
        "gauge", "Longest time of this start from one checkpoint (or its begin) to the next."
    ),
    "vlal_checkpoint_failures_total": Metric(
        "counter", "Checkpoints and best models that could not be written.",
        {"reason": SAVE_FAILURES},
    ),
    "vlal_resume_total": Metric(
        "counter",
        "This start: fresh, exact, resharded (another number of ranks), fallback (the newest "
        "checkpoint was damaged).",
        {"kind": RESUME_KINDS},
    ),
    "vlal_signal_received_total": Metric(
        "counter", "What made this rank stop: a signal, or that its launcher was gone.",
        {"signal": STOPS},
    ),
    "vlal_tracker_dropped_total": Metric(
        "counter", "Records that a tracker did not take in time, on rank 0.", {"tracker": TRACKERS}
    ),
}  # fmt: skip
"""What a training rank says of itself."""

SCORE: dict[str, Metric] = {
    "ray_vlal_score_shards_pending": Metric(
        "gauge", "Shards that this job has still to score or to check.", {"run": ()}
    ),
    "ray_vlal_score_shards_total": Metric(
        "counter", "Shards whose file this job committed or found, and those given out again.",
        {"run": (), "result": ("committed", "skipped", "retried")},
    ),
    "ray_vlal_score_images_total": Metric(
        "counter", "Crops encoded, and crops that could not be used.",
        {"run": (), "result": ("ok", "failed")},
    ),
    "ray_vlal_score_seconds_total": Metric(
        "counter", "Where the actors' time went, of threads side by side the sum.",
        {"run": (), "phase": ("fetch", "decode", "copy", "encode", "write")},
    ),
}  # fmt: skip
"""What the driver of a scoring job on Ray says, a shard at a time; `run` is its score root."""

PACK: dict[str, Metric] = {
    "vlal_pack_instances_total": Metric(
        "counter", "Instances of finished shards; at the end all rows of the input.",
        {"run": (), "result": PACK_RESULTS},
    ),
    "vlal_pack_shards_total": Metric(
        "counter", "Finished shards: written, or skipped because an earlier run wrote them.",
        {"run": (), "result": ("written", "skipped")},
    ),
    "vlal_pack_bytes_total": Metric("counter", "Bytes of their tars.", {"run": ()}),
}  # fmt: skip
"""What pack says through node_exporter, a shard at a time; `run` is its dataset root."""

JOB: dict[str, Metric] = {
    "vlal_job_last_success_timestamp_seconds": Metric(
        "gauge", "When it last ended with 0; 0: not yet.", {"job_name": (), "run": ()}
    ),
    "vlal_job_duration_seconds": Metric(
        "gauge", "How long its last run took.", {"job_name": (), "run": ()}
    ),
    "vlal_job_exit_code": Metric(
        "gauge",
        "Exit code of its last run; 0 done, 75 stopped and resumable.",
        {"job_name": (), "run": ()},
    ),
}
"""What a program says through node_exporter when it ends; `run` is the root that it writes."""

PROCESS: dict[str, Metric] = {
    "process_cpu_seconds_total": Metric("counter", "CPU of the process, all threads."),
    "process_resident_memory_bytes": Metric("gauge", "Its resident memory."),
    "process_virtual_memory_bytes": Metric("gauge", "Its address space."),
    "process_open_fds": Metric("gauge", "Its open files and sockets."),
    "process_max_fds": Metric("gauge", "How many it may open."),
    "process_start_time_seconds": Metric("gauge", "When it started."),
}
"""Of prometheus_client, on Linux; the texts are ours."""
