"""What the driver of a scoring job says through Ray's own exporter.

Ray's nodes serve it with the rest of their metrics. What a driver counted in its last seconds may
not be served any more when it has ended (ray#39212); its summary is exact.
"""

from dataclasses import asdict

from vlal_dist.observability.names import SCORE
from vlal_dist.scoring.result import ShardResult

PREFIX = "ray_"
"""What Ray puts before the names of an application's metrics; after counters it puts `_total`."""


class RayMetrics:
    """The metrics of `SCORE`; made where Ray is connected.

    Args:
        run: the score root, which labels all of them.
    """

    def __init__(self, *, run: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        for name, metric in SCORE.items():
            plain, labels = name.removeprefix(PREFIX).removesuffix("_total"), tuple(metric.labels)
            made: Counter | Gauge
            if metric.kind == "counter":
                made = self._counters[name] = Counter(plain, metric.text, labels)
            else:
                made = self._gauges[name] = Gauge(plain, metric.text, labels)
            made.set_default_tags({"run": run})
        self._retried = 0

    def pending(self, shards: int) -> None:
        """Say how many shards have no result."""
        self._gauges["ray_vlal_score_shards_pending"].set(shards)

    def publish(self, result: object, *, left: int, retried: int) -> None:
        """Count what a call gave, if it was about a shard.

        Args:
            result: of the call.
            left: calls without a result.
            retried: calls given out again so far.
        """
        if not isinstance(result, ShardResult):
            return
        outcome = "committed" if result.created else "skipped"
        self._add("ray_vlal_score_shards_total", 1, result=outcome)
        self._add("ray_vlal_score_shards_total", retried - self._retried, result="retried")
        self._retried = retried
        self._add("ray_vlal_score_images_total", result.images, result="ok")
        self._add("ray_vlal_score_images_total", len(result.quarantined), result="failed")
        for phase, seconds in asdict(result.seconds).items():
            self._add("ray_vlal_score_seconds_total", seconds, phase=phase)
        self.pending(left)

    def _add(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray refuses to count nothing
            self._counters[name].inc(amount, tags=labels)
