"""What a training rank says about itself: a Prometheus endpoint, and `metrics.jsonl`.

Names and buckets: operations note 3b. Ranks export what they did themselves; sums over ranks are
the scraper's. Losses and rates are gauges of values that were reduced anyway at a log interval: no
metric makes an accelerator wait.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

logger = logging.getLogger(__name__)

RUN_STATES = ("init", "restoring", "training", "evaluating", "saving", "stopping", "done", "failed")
LOSS_TERMS = ("total", "positive", "negative", "feasible", "infeasible")
TERM_KINDS = ("positive", "negative", "feasible_negated", "infeasible_negated", "ignored")
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WAIT_BUCKETS = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
PORTS_TRIED = 64
LOADER_NUMBERS: dict[str, tuple[type[Gauge] | type[Counter], str]] = {
    "samples": (Counter, "Samples read."),
    "sample_bytes": (Counter, "Bytes of their tar ranges."),
    "read_seconds": (Counter, "Reading and checking, waits for fetches included; all threads."),
    "decode_seconds": (Counter, "Decoding and resizing, all threads."),
    "label_seconds": (Counter, "Making labels and weights of batches, all threads."),
    "ready_steps": (Gauge, "Steps that were ready when the last one was taken."),
    "fetches": (Counter, "Ranged reads of remote shards."),
    "fetched_bytes": (Counter, "Bytes of them."),
    "fetch_seconds": (Counter, "Seconds in them, all threads."),
    "refetched": (Counter, "Samples that failed a check and were read once more."),
    "damaged": (Counter, "Samples that failed it again."),
    "cache_hits": (Counter, "Parts found in the disk cache."),
    "cache_misses": (Counter, "Parts not found there."),
    "cache_evictions": (Counter, "Parts removed from it by this rank."),
    "cache_failed_writes": (Counter, "Parts that could not be written to it."),
    "cache_bytes": (Gauge, "Bytes in it, of all ranks of the node."),
}
"""Metrics of the stream, without their prefix `vlal_loader_`."""


class TrainMetrics:
    """The metrics of one training rank, in a registry of their own.

    Args:
        build: labels of `vlal_build_info`, such as version and torch.
    """

    def __init__(self, build: Mapping[str, str]) -> None:
        self.registry = registry = CollectorRegistry()
        Gauge("vlal_build_info", "Versions, as labels.", list(build), registry=registry).labels(
            **build
        ).set(1)
        self._state = Gauge(
            "vlal_run_state", "1 for the present state.", ["state"], registry=registry
        )
        self._steps = Counter("vlal_train_steps", "Optimizer steps.", registry=registry)
        self._samples = Counter("vlal_train_samples", "Rows of this rank.", registry=registry)
        self._epoch = Gauge("vlal_train_epoch", "Epoch, from 0.", registry=registry)
        self._global_step = Gauge(
            "vlal_train_global_step", "Steps since the start.", registry=registry
        )
        self._loss = Gauge(
            "vlal_train_loss", "Mean loss of a row over all ranks.", ["term"], registry=registry
        )
        self._rate = Gauge(
            "vlal_train_learning_rate", "Learning rate.", ["group"], registry=registry
        )
        self._duration = Histogram(
            "vlal_train_step_duration_seconds",
            "A step, waiting for the loader included.",
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._terms = Counter(
            "vlal_train_label_terms", "Pairs of this rank by term.", ["kind"], registry=registry
        )
        self._last_step = Gauge(
            "vlal_train_last_step_timestamp_seconds", "When a step last ended.", registry=registry
        )
        self._wait = Histogram(
            "vlal_loader_wait_seconds",
            "Waiting for the next batch.",
            buckets=WAIT_BUCKETS,
            registry=registry,
        )
        self._map = Gauge(
            "vlal_eval_map_ratio", "mAP of a group, 0-1.", ["split", "group"], registry=registry
        )
        self._loader: dict[str, Gauge | Counter] = {}
        self._counted: dict[str, float] = {}
        for name, (kind, text) in LOADER_NUMBERS.items():
            self._loader[name] = kind(f"vlal_loader_{name}", text, registry=registry)
        self._server: WSGIServer | None = None
        self.state("init")

    def serve(self, *, host: str, port: int) -> int | None:
        """Serve `/metrics` on `host` at `port`, or the next free one.

        Returns:
            The port, or None when there is none: that is only warned of, training goes on.
        """
        for candidate in range(port, min(port + PORTS_TRIED, 65536)):
            try:
                self._server, _ = start_http_server(candidate, addr=host, registry=self.registry)
            except OSError as error:
                reason = error
                continue
            logger.info("metrics: http://%s:%d/metrics", host, candidate)
            return candidate
        logger.warning(
            "no /metrics endpoint: no port from %d on can be bound on %s (%s); training goes on, "
            "set observability.metrics_host and metrics_port",
            port,
            host,
            reason,
        )
        return None

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def state(self, name: str) -> None:
        """Say what the run is doing, one of `RUN_STATES`."""
        for known in RUN_STATES:
            self._state.labels(known).set(known == name)

    def step(self, *, epoch: int, step: int, rows: int, wait_s: float, duration_s: float) -> None:
        """Count a finished optimizer step of this rank."""
        self._steps.inc()
        self._samples.inc(rows)
        self._epoch.set(epoch)
        self._global_step.set(step)
        self._wait.observe(wait_s)
        self._duration.observe(duration_s)
        self._last_step.set(time.time())

    def interval(
        self,
        *,
        loss: Mapping[str, float],
        rates: Mapping[str, float],
        term_counts: Mapping[str, int],
    ) -> None:
        """Publish what a log interval reduced: loss by term, rate by group, this rank's pairs."""
        for term, value in loss.items():
            self._loss.labels(term).set(value)
        for group, value in rates.items():
            self._rate.labels(group).set(value)
        for kind, count in term_counts.items():
            self._terms.labels(kind).inc(count)

    def loader(self, numbers: Mapping[str, float]) -> None:
        """Publish what the stream of this rank did so far; the names are of `LOADER_NUMBERS`."""
        for name, value in numbers.items():
            metric = self._loader[name]
            if isinstance(metric, Gauge):
                metric.set(value)
            else:
                metric.inc(value - self._counted.get(name, 0.0))
                self._counted[name] = value

    def validation(self, *, split: str, mean_ap: Mapping[str, float]) -> None:
        """Publish the mAP of each group, shares of 1."""
        for group, value in mean_ap.items():
            self._map.labels(split, group).set(value)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, appended to a local file or kept for a remote one.

    Args:
        kept: lines of the run so far.
        append_to: the local file; None for a remote root.
        replace: overwrites the whole file.
    """

    def __init__(
        self, *, kept: bytes, append_to: Path | None, replace: Callable[[bytes], None]
    ) -> None:
        self._data, self._append_to, self._replace = kept, append_to, replace
        replace(kept)

    def write(self, record: Mapping[str, object]) -> None:
        """Add a line. A disk that is full or gone is warned of, and stops nothing."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        if self._append_to is None:
            self._data += line
            return
        try:
            with self._append_to.open("ab") as file:
                file.write(line)
        except OSError as error:
            logger.warning("%s: a line was not written: %s", self._append_to, error)

    def flush(self) -> None:
        """Upload the lines so far, for a remote root."""
        if self._append_to is None:
            self._replace(self._data)


def lines_until(data: bytes, *, step: int) -> bytes:
    """The lines of a `metrics.jsonl` up to a step: what a resumed run keeps.

    Later lines will be written again; a line that a kill cut in two is dropped.
    """
    kept = []
    for line in data.splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            logger.warning("metrics.jsonl: dropped a damaged line of %d bytes", len(line))
    return b"".join(kept)
