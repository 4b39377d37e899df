"""Prometheus metrics of a training rank, and their HTTP endpoint.

It answers ten times a second at most, all others wait in the kernel; what it says is made anew
once a second at most; of more connections than a few the oldest is ended. So neither a scraper in
a tight loop nor a hundred that hang take the interpreter's lock, threads or files away from the
training, and the one that asks properly is answered.

Names: names.py. Ranks export what they did themselves; sums over ranks are the scraper's. Losses
and rates are gauges of values that were reduced anyway at a log interval: no metric makes an
accelerator wait.
"""

import contextlib
import itertools
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    generate_latest,
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

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ANSWERS_PER_S = 10
AT_ONCE = 100
"""Answers saved up while fewer were asked for."""
KEPT_S = 1.0
"""How long a text is sent again before it is made anew."""
MOST_CONNECTIONS = 16
SILENCE_S = 10.0
"""After which a client that sends or takes nothing is given up."""


class Endpoint(socketserver.ThreadingTCPServer):
    """Serves one text, whatever the path, from threads that end with the process.

    Args:
        render: makes the text.
        host, port: where to listen.

    Raises:
        OSError: it cannot listen there.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, render: Callable[[], bytes], *, host: str, port: int) -> None:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self.address_family, address = found[0][0], found[0][4]
        super().__init__(address, _Handler)  # type: ignore[arg-type]
        self._render = render
        self._text, self._made_at = b"", -KEPT_S
        self._rendering = threading.Lock()
        self._answer_at = 0.0
        self._open: list[socket.socket] = []
        self._opening = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True, name="metrics").start()

    def close(self) -> None:
        """Stop listening; connections that hang do not delay it."""
        self.shutdown()
        self.server_close()

    def text(self) -> bytes:
        """What to send now."""
        with self._rendering:
            if time.monotonic() - self._made_at >= KEPT_S:
                self._text, self._made_at = self._render(), time.monotonic()
            return self._text

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection, in its turn."""
        now = time.monotonic()
        time.sleep(max(0.0, self._answer_at - now))
        self._answer_at = max(self._answer_at, now - AT_ONCE / ANSWERS_PER_S) + 1 / ANSWERS_PER_S
        with self._opening:
            self._open.append(request)
            if len(self._open) > MOST_CONNECTIONS:
                with contextlib.suppress(OSError):  # it may just have ended
                    self._open[0].shutdown(socket.SHUT_RDWR)
                del self._open[0]
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._opening, contextlib.suppress(ValueError):
            self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or hangs is no error here; a text that cannot be made is."""
        if not isinstance(sys.exception(), OSError):
            logger.warning("a scrape was not answered", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    timeout = SILENCE_S

    def do_GET(self) -> None:
        """Send the text."""
        text = self.server.text()
        self.send_response_only(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: a line per scrape would drown the log."""


PORTS_TRIED = 64


class AtScrape(Collector):
    """Metrics of `STORAGE` that are read when a scrape comes.

    Args:
        read: the values; those it leaves out are left out of the scrape.
    """

    def __init__(self, read: Callable[[], Readings]) -> None:
        self._read = read

    def collect(self) -> Iterable[Family]:
        """The metrics as they are now."""
        readings = self._read()
        for name, metric in STORAGE.items():
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(name, metric.text, labels=list(metric.labels))
            for (of, *labels), value in readings.items():
                if of == name:
                    family.add_metric(labels, value)
            if family.samples:
                yield family


class TrainMetrics:
    """The metrics of one training rank, in a registry of their own.

    Args:
        build: labels of `vlal_build_info`.
        read: values of the metrics of `STORAGE`, called by the thread that answers a scrape; must
            not raise.
    """

    def __init__(self, build: Mapping[str, str], *, read: Callable[[], Readings]) -> None:
        # A fifth more series, which nobody looks at.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        metrics = {**TRAIN, **LOADER}
        self._gauges = {
            name: Gauge(name, metric.text, list(metric.labels), registry=registry)
            for name, metric in metrics.items()
            if metric.kind == "gauge"
        }
        self._counters = {
            name: Counter(name, metric.text, list(metric.labels), registry=registry)
            for name, metric in metrics.items()
            if metric.kind == "counter"
        }
        self._histograms = {
            name: Histogram(name, metric.text, buckets=metric.buckets, registry=registry)
            for name, metric in metrics.items()
            if metric.kind == "histogram"
        }
        self._summaries = {
            name: Summary(name, metric.text, registry=registry)
            for name, metric in metrics.items()
            if metric.kind == "summary"
        }
        for name, counter in self._counters.items():
            # At 0 from the start: of a series that begins at 1, `increase` sees nothing.
            for values in label_values(metrics[name]):
                counter.labels(*values)
        registry.register(AtScrape(read))
        ProcessCollector(registry=registry)
        self._counted: dict[str, float] = {}
        self._saved_at, self._longest_s = time.time(), 0.0
        self._endpoint: Endpoint | None = None
        self._gauges["vlal_build_info"].labels(**build).set(1)
        self.state("init")

    def serve(self, *, host: str, port: int) -> int | None:
        """Serve `/metrics` on `host` at `port`, or the next free one.

        Returns:
            The port, or None when there is none: that is only warned of, training goes on.
        """
        for candidate in range(port, min(port + PORTS_TRIED, 65536)):
            try:
                self._endpoint = Endpoint(
                    lambda: generate_latest(self.registry), host=host, port=candidate
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
        """Stop serving."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def state(self, name: str) -> None:
        """Say what the run is doing, one of `RUN_STATES`."""
        for known in RUN_STATES:
            self._gauges["vlal_run_state"].labels(known).set(known == name)
        if name == "training":
            # A first step after the start or a long validation is not late yet.
            self._gauges["vlal_train_last_step_timestamp_seconds"].set_to_current_time()

    def resumed(self, kind: str) -> None:
        """Say how this start began, one of `RESUME_KINDS`."""
        self._counters["vlal_resume_total"].labels(kind).inc()

    def stopped_by(self, signal: str) -> None:
        """Count a signal, by its name."""
        self._counters["vlal_signal_received_total"].labels(signal).inc()

    def step(self, *, epoch: int, step: int, rows: int, wait_s: float, duration_s: float) -> None:
        """Count a finished optimizer step of this rank."""
        self._counters["vlal_train_steps_total"].inc()
        self._counters["vlal_train_samples_total"].inc(rows)
        self._gauges["vlal_train_epoch"].set(epoch)
        self._gauges["vlal_train_global_step"].set(step)
        self._histograms["vlal_loader_wait_seconds"].observe(wait_s)
        self._histograms["vlal_train_step_duration_seconds"].observe(duration_s)
        self._gauges["vlal_train_last_step_timestamp_seconds"].set_to_current_time()

    def times(self, steps: Iterable[tuple[float, float]]) -> None:
        """Publish (seconds of this rank's passes, seconds of the sum over ranks) of steps."""
        for compute_s, allreduce_s in steps:
            self._summaries["vlal_train_compute_seconds"].observe(compute_s)
            self._summaries["vlal_train_allreduce_seconds"].observe(allreduce_s)

    def refused(self) -> None:
        """Count a step that was not finite."""
        self._counters["vlal_train_nonfinite_steps_total"].inc()

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
            self._gauges["vlal_train_loss"].labels(term).set(value)
        for group, value in rates.items():
            self._gauges["vlal_train_learning_rate"].labels(group).set(value)
        for kind, count in term_counts.items():
            self._counters["vlal_train_label_terms_total"].labels(kind).inc(count)
        for kind, count in visits.items():
            self._gauges["vlal_train_ledger_visits"].labels(kind).set(count)
        self._gauges["vlal_train_ignored_attributes"].set(ignored)
        if grad_norm is not None:
            self._gauges["vlal_train_grad_norm"].set(grad_norm)
        self._gauges["vlal_train_quarantined_samples"].set(quarantined)

    def loader(self, numbers: Mapping[str, float]) -> None:
        """Publish what the stream of this rank did so far.

        Args:
            numbers: name in `LOADER`, without `vlal_loader_` and `_total`, -> value so far.
        """
        for name, value in numbers.items():
            gauge = self._gauges.get(f"vlal_loader_{name}")
            if gauge is not None:
                gauge.set(value)
            else:
                more = value - self._counted.get(name, 0.0)
                self._counters[f"vlal_loader_{name}_total"].inc(more)
                self._counted[name] = value

    def validation(
        self, *, split: str, mean_ap: Mapping[str, float], attributes: Mapping[str, int]
    ) -> None:
        """Publish the mAP of each group, shares of 1, and the number of attributes by status."""
        for group, value in mean_ap.items():
            self._gauges["vlal_eval_map_ratio"].labels(split, group).set(value)
        for status, count in attributes.items():
            self._gauges["vlal_eval_attributes"].labels(status).set(count)

    def saved(self, *, seconds: float, size_bytes: int) -> None:
        """Count a checkpoint that was written."""
        now = time.time()
        self._longest_s = max(self._longest_s, now - self._saved_at)
        self._saved_at = now
        self._gauges["vlal_checkpoint_interval_seconds"].set(self._longest_s)
        self._gauges["vlal_checkpoint_last_success_timestamp_seconds"].set(now)
        self._gauges["vlal_checkpoint_size_bytes"].set(size_bytes)
        self._histograms["vlal_checkpoint_duration_seconds"].observe(seconds)

    def save_failed(self, reason: str) -> None:
        """Count one that was not, for one of `SAVE_FAILURES`."""
        self._counters["vlal_checkpoint_failures_total"].labels(reason).inc()

    def tracker_dropped(self, name: str, count: int) -> None:
        """Count records that one of `TRACKERS` did not take."""
        self._counters["vlal_tracker_dropped_total"].labels(name).inc(count)


def label_values(metric: Metric) -> Iterator[tuple[str, ...]]:
    """Every combination of a labelled metric's known values; none where values are open."""
    if metric.labels:
        yield from itertools.product(*metric.labels.values())
