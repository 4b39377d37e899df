"""Prometheus metrics of a training rank, and their HTTP endpoint.

Each rank exports what it did itself; summing over ranks is left to Prometheus. Losses and rates are
values that were reduced at a log interval anyway, so no metric makes an accelerator wait.
"""

import itertools
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from vlal_dist.observability.metric_definitions import (
    LOADER,
    RUN_STATES,
    STORAGE,
    TRAIN,
    Metric,
    Readings,
)

logger = logging.getLogger(__name__)

PORTS_TRIED = 64


class TrainMetrics(Collector):
    """The metrics of one training rank, in a registry of their own.

    Args:
        build: labels of `vlal_build_info`.
        read: values of the metrics of `STORAGE`, called by the thread that answers a scrape; those
            that it omits are not exported.
    """

    def __init__(self, build: Mapping[str, str], *, read: Callable[[], Readings]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a fifth more series, unused
        self.registry = CollectorRegistry()
        self._read = read
        self._loader: Mapping[str, float] = {}
        self._metrics = {name: self._register(name, metric) for name, metric in TRAIN.items()}
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self._saved_at, self._longest_s = time.time(), 0.0
        self._server: WSGIServer | None = None
        self._of("vlal_build_info").labels(**build).set(1)
        self.state("init")

    def serve(self, *, host: str, port: int) -> int | None:
        """Serve `/metrics` on `host` at `port`, or the next free one.

        Returns:
            The port, or None when there is none: training goes on, with a warning.
        """
        for candidate in range(port, min(port + PORTS_TRIED, 65536)):
            try:
                self._server, _ = start_http_server(
                    candidate, addr=host or "0.0.0.0", registry=self.registry
                )
            except OSError as error:
                reason = error
                if isinstance(error, socket.gaierror):  # slow, and the same for every port
                    break
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
        """Stop serving; open connections do not delay it."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def collect(self) -> Iterable[Family]:
        """The metrics of the loader and of storage, as they are now."""
        readings: dict[tuple[str, ...], float] = {
            (name,): self._loader.get(metric.field, 0.0) for name, metric in LOADER.items()
        }
        readings.update(self._read())
        for name, metric in {**LOADER, **STORAGE}.items():
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(name, metric.text, labels=list(metric.labels))
            for (of, *labels), value in readings.items():
                if of == name:
                    family.add_metric(labels, value)
            if family.samples:
                yield family

    def state(self, name: str) -> None:
        """Set what the run is doing, one of `RUN_STATES`."""
        for known in RUN_STATES:
            self._of("vlal_run_state", known).set(known == name)
        if name == "training":
            # A first step after the start or a long validation is not late yet.
            self._of("vlal_train_last_step_timestamp_seconds").set(time.time())

    def resumed(self, kind: str) -> None:
        """Count how this start began, one of `RESUME_KINDS`."""
        self._of("vlal_resume_total", kind).inc()

    def stopped_by(self, signal: str) -> None:
        """Count a signal, by its name."""
        self._of("vlal_signal_received_total", signal).inc()

    def step(self, *, epoch: int, step: int, rows: int, wait_s: float, duration_s: float) -> None:
        """Count a finished optimizer step of this rank."""
        self._of("vlal_train_steps_total").inc()
        self._of("vlal_train_samples_total").inc(rows)
        self._of("vlal_train_epoch").set(epoch)
        self._of("vlal_train_global_step").set(step)
        self._of("vlal_loader_wait_seconds").observe(wait_s)
        self._of("vlal_train_step_duration_seconds").observe(duration_s)
        self._of("vlal_train_last_step_timestamp_seconds").set(time.time())

    def times(self, steps: Iterable[tuple[float, float]]) -> None:
        """Publish (seconds of this rank's passes, seconds of the sum over ranks) of steps."""
        for compute_s, allreduce_s in steps:
            self._of("vlal_train_compute_seconds").observe(compute_s)
            self._of("vlal_train_allreduce_seconds").observe(allreduce_s)

    def refused(self) -> None:
        """Count a step that was not finite."""
        self._of("vlal_train_nonfinite_steps_total").inc()

    def interval(
        self,
        *,
        loss: Mapping[str, float],
        rates: Mapping[str, float],
        term_counts: Mapping[str, int],
        ignored: float,
        grad_norm: float | None,
        visits: Mapping[str, int],
        quarantined: int,
    ) -> None:
        """Publish what a log interval reduced.

        Args:
            loss: term -> mean loss of a row.
            rates: parameter group -> learning rate.
            term_counts: kind -> pairs of this rank since the last time.
            ignored: attributes of a row, mean.
            grad_norm: of the last step; None where no rank holds the gradient.
            visits: kind -> visits of the epoch.
            quarantined: samples on the list.
        """
        for term, value in loss.items():
            self._of("vlal_train_loss", term).set(value)
        for group, value in rates.items():
            self._of("vlal_train_learning_rate", group).set(value)
        for kind, count in term_counts.items():
            self._of("vlal_train_label_terms_total", kind).inc(count)
        for kind, count in visits.items():
            self._of("vlal_train_ledger_visits", kind).set(count)
        self._of("vlal_train_ignored_attributes").set(ignored)
        if grad_norm is not None:
            self._of("vlal_train_grad_norm").set(grad_norm)
        self._of("vlal_train_quarantined_samples").set(quarantined)

    def loader(self, numbers: Mapping[str, float]) -> None:
        """Publish what the loader of this rank did so far: `TrainLoader.numbers`."""
        self._loader = numbers

    def validation(
        self, *, split: str, mean_ap: Mapping[str, float], attributes: Mapping[str, int]
    ) -> None:
        """Publish the mAP of each group, shares of 1, and the number of attributes by status."""
        for group, value in mean_ap.items():
            self._of("vlal_eval_map_ratio", split, group).set(value)
        for status, count in attributes.items():
            self._of("vlal_eval_attributes", status).set(count)

    def saved(self, *, seconds: float, size_bytes: int) -> None:
        """Count a checkpoint that was written."""
        now = time.time()
        self._longest_s = max(self._longest_s, now - self._saved_at)
        self._saved_at = now
        self._of("vlal_checkpoint_interval_seconds").set(self._longest_s)
        self._of("vlal_checkpoint_last_success_timestamp_seconds").set(now)
        self._of("vlal_checkpoint_size_bytes").set(size_bytes)
        self._of("vlal_checkpoint_duration_seconds").observe(seconds)

    def save_failed(self, reason: str) -> None:
        """Count a checkpoint that was not written, for one of `SAVE_FAILURES`."""
        self._of("vlal_checkpoint_failures_total", reason).inc()

    def tracker_dropped(self, name: str, count: int) -> None:
        """Count records that one of `TRACKERS` did not take."""
        self._of("vlal_tracker_dropped_total", name).inc(count)

    def _register(self, name: str, metric: Metric) -> Any:
        if metric.kind == "histogram":
            return Histogram(name, metric.text, buckets=metric.buckets, registry=self.registry)
        if metric.kind == "summary":
            return Summary(name, metric.text, registry=self.registry)
        if metric.kind == "gauge":
            return Gauge(name, metric.text, list(metric.labels), registry=self.registry)
        counter = Counter(name, metric.text, list(metric.labels), registry=self.registry)
        if metric.labels:
            # At 0 from the start: `increase` does not see a series that begins at 1.
            for values in itertools.product(*metric.labels.values()):
                counter.labels(*values)
        return counter

    def _of(self, name: str, *labels: str) -> Any:
        """A metric, or the series of it that has these values of its labels."""
        metric = self._metrics[name]
        return metric.labels(*labels) if labels else metric
