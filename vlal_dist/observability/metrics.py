"""Prometheus metrics of a training rank, and their HTTP endpoint.

Each rank exports what it did itself; summing over ranks is left to Prometheus. Losses and rates are
values that were reduced at a log interval anyway, so no metric makes an accelerator wait.

Values are kept here and handed to prometheus_client at each scrape. Its own Counter and Gauge would
keep them in files shared by processes wherever `PROMETHEUS_MULTIPROC_DIR` is set, and fail with
that folder.
"""

import itertools
import logging
import socket
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
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


class Observations:
    """Observed values of a histogram or summary: how many up to each bound, and their sum.

    Args:
        metric: its definition; without buckets a summary.
    """

    def __init__(self, metric: Metric) -> None:
        self._bounds = metric.buckets
        self._counts, self._sum = [0] * (len(metric.buckets) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str) -> Family:
        """The values so far, as Prometheus takes them."""
        upto = list(itertools.accumulate(self._counts))
        if not self._bounds:
            return SummaryMetricFamily(name, text, count_value=upto[-1], sum_value=self._sum)
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return HistogramMetricFamily(
            name, text, buckets=list(zip(bounds, upto, strict=True)), sum_value=self._sum
        )


class TrainMetrics(Collector):
    """The metrics of one training rank, in a registry of their own.

    Args:
        build: labels of `vlal_build_info`.
        read: values of the metrics of `STORAGE`, called by the thread that answers a scrape; those
            that it omits are not exported.
    """

    def __init__(self, build: Mapping[str, str], *, read: Callable[[], Readings]) -> None:
        self.registry = CollectorRegistry()
        self._read = read
        self._loader: Mapping[str, float] = {}
        self._observed = {
            name: Observations(metric)
            for name, metric in TRAIN.items()
            if metric.kind in ("histogram", "summary")
        }
        # At 0 from the start: `increase` does not see a series that begins at 1.
        self._values: dict[tuple[str, ...], float] = {
            (name, *values): 0.0
            for name, metric in TRAIN.items()
            if name not in self._observed and (metric.kind == "counter" or not metric.labels)
            for values in itertools.product(*metric.labels.values())
        }
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self._saved_at, self._longest_s = time.time(), 0.0
        self._server: WSGIServer | None = None
        self._set(
            "vlal_build_info", *(build[label] for label in TRAIN["vlal_build_info"].labels), to=1
        )
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
            except Exception as error:  # a host that is no name at all raises a ValueError
                reason = error
                if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
                    break  # slow, and the same for every port
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
        """All metrics as they are now; called by the thread that answers a scrape."""
        readings: dict[tuple[str, ...], float] = self._values.copy()
        for name, metric in LOADER.items():
            readings[(name,)] = self._loader.get(metric.field, 0.0)
        readings.update(self._read())
        series: dict[str, list[tuple[list[str], float]]] = {}
        for (of, *labels), value in readings.items():
            series.setdefault(of, []).append((labels, value))
        for name, metric in {**TRAIN, **LOADER, **STORAGE}.items():
            if observed := self._observed.get(name):
                yield observed.family(name, metric.text)
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(name, metric.text, labels=list(metric.labels))
            for labels, value in series.get(name, []):
                family.add_metric(labels, value)
            if family.samples:
                yield family

    def state(self, name: str) -> None:
        """Set what the run is doing, one of `RUN_STATES`."""
        for known in RUN_STATES:
            self._set("vlal_run_state", known, to=known == name)
        if name == "training":
            # A first step after the start or a long validation is not late yet.
            self._set("vlal_train_last_step_timestamp_seconds", to=time.time())

    def resumed(self, kind: str) -> None:
        """Count how this start began, one of `RESUME_KINDS`."""
        self._add("vlal_resume_total", kind)

    def stopped_by(self, signal: str) -> None:
        """Count a signal, by its name."""
        self._add("vlal_signal_received_total", signal)

    def step(self, *, epoch: int, step: int, rows: int, wait_s: float, duration_s: float) -> None:
        """Count a finished optimizer step of this rank."""
        self._add("vlal_train_steps_total")
        self._add("vlal_train_samples_total", of=rows)
        self._set("vlal_train_epoch", to=epoch)
        self._set("vlal_train_global_step", to=step)
        self._observed["vlal_loader_wait_seconds"].add(wait_s)
        self._observed["vlal_train_step_duration_seconds"].add(duration_s)
        self._set("vlal_train_last_step_timestamp_seconds", to=time.time())

    def times(self, steps: Iterable[tuple[float, float]]) -> None:
        """Publish (seconds of this rank's passes, seconds of the sum over ranks) of steps."""
        for compute_s, allreduce_s in steps:
            self._observed["vlal_train_compute_seconds"].add(compute_s)
            self._observed["vlal_train_allreduce_seconds"].add(allreduce_s)

    def refused(self) -> None:
        """Count a step that was not finite."""
        self._add("vlal_train_nonfinite_steps_total")

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
            self._set("vlal_train_loss", term, to=value)
        for group, value in rates.items():
            self._set("vlal_train_learning_rate", group, to=value)
        for kind, count in term_counts.items():
            self._add("vlal_train_label_terms_total", kind, of=count)
        for kind, count in visits.items():
            self._set("vlal_train_ledger_visits", kind, to=count)
        self._set("vlal_train_ignored_attributes", to=ignored)
        if grad_norm is not None:
            self._set("vlal_train_grad_norm", to=grad_norm)
        self._set("vlal_train_quarantined_samples", to=quarantined)

    def loader(self, numbers: Mapping[str, float]) -> None:
        """Publish what the loader of this rank did so far: `TrainLoader.numbers`."""
        self._loader = numbers

    def validation(
        self, *, split: str, mean_ap: Mapping[str, float], attributes: Mapping[str, int]
    ) -> None:
        """Publish the mAP of each group, shares of 1, and the number of attributes by status."""
        for group, value in mean_ap.items():
            self._set("vlal_eval_map_ratio", split, group, to=value)
        for status, count in attributes.items():
            self._set("vlal_eval_attributes", status, to=count)

    def saved(self, *, seconds: float, size_bytes: int) -> None:
        """Count a checkpoint that was written."""
        now = time.time()
        self._longest_s = max(self._longest_s, now - self._saved_at)
        self._saved_at = now
        self._set("vlal_checkpoint_interval_seconds", to=self._longest_s)
        self._set("vlal_checkpoint_last_success_timestamp_seconds", to=now)
        self._set("vlal_checkpoint_size_bytes", to=size_bytes)
        self._observed["vlal_checkpoint_duration_seconds"].add(seconds)

    def save_failed(self, reason: str) -> None:
        """Count a checkpoint that was not written, for one of `SAVE_FAILURES`."""
        self._add("vlal_checkpoint_failures_total", reason)

    def tracker_dropped(self, name: str, count: int) -> None:
        """Count records that one of `TRACKERS` did not take."""
        self._add("vlal_tracker_dropped_total", name, of=count)

    def _add(self, name: str, *labels: str, of: float = 1.0) -> None:
        """Raise a counter: its series that has these values of its labels."""
        key = (name, *labels)
        self._values[key] = self._values.get(key, 0.0) + of

    def _set(self, name: str, *labels: str, to: float) -> None:
        """Set a gauge: its series that has these values of its labels."""
        self._values[name, *labels] = to
