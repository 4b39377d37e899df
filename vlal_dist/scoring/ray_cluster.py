"""Scoring on Ray: connect or start a session, run actors, export metrics.

Ray's nodes serve it with the rest of their metrics. What a driver counted in its last seconds may
not be served any more when it has ended (ray#39212); its summary is exact.

Shards are handed out to actors that are ready, two at a time (one is fetched and decoded while the
other is encoded), so a pending actor (no free GPU yet: the demand that autoscalers see) holds no
work. A lost actor is replaced, and its shards go first in the queue again, at most `max_retries`
times. When all are given out, a shard that takes much longer than others is given out once more:
its actor may hang without being lost. Nothing else is needed: a score file is committed create-only
under a name made of digests, so a shard scored twice is one file. Only job descriptions, counts and
the similarities of annotated pairs pass through Ray; crops, scores and credentials never do.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vlal_dist.errors import ConfigError, Stopped, StorageError, VlalError
from vlal_dist.observability.metric_definitions import SCORE
from vlal_dist.scoring.identity import ScoreSettings
from vlal_dist.scoring.shard_task import ShardResult
from vlal_dist.scoring.worker import ScoringJob, ShardScorer, WarmUp

logger = logging.getLogger(__name__)

LOCAL_ENVIRONMENT = {
    # Despite its name: 0 keeps every listener of a Ray started here on 127.0.0.1 (ray 2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Events of every call, for a dashboard that is not there: 3 kB a shard in Ray's control store.
    "RAY_task_events_report_interval_ms": "0",
}
OBJECT_STORE_BYTES = 100_000_000
"""Nothing large passes through it; Ray refuses less than 75 MB."""


def on_running_ray() -> bool:
    """Whether this process is to use a Ray that others started (`ray job submit`, RAY_ADDRESS).

    Raises:
        ConfigError: RAY_ADDRESS is the address of the Jobs API, which takes submissions only.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address} is the Jobs API; run `ray job submit --address {address} -- "
            "python -m vlal_dist.score_clip ...`, or unset it to start a local Ray"
        )
    return address not in ("", "local")


def refuse_relative_in_job(name: str, path: str) -> None:
    """A job with a working directory runs in a copy of it, where outputs would be lost.

    Args:
        name: key or flag that gives the path.
        path: where something is to be read or written.

    Raises:
        ConfigError: this is such a job and the path is relative.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    in_copy = bool((job.get("runtime_env") or {}).get("working_dir"))
    if in_copy and "://" not in path and not Path(path).is_absolute():
        raise ConfigError(
            f"{name} {path} is relative, and this Ray job runs in a temporary copy of the "
            "submitted working directory; give an absolute path that all nodes see, or s3://"
        )


@contextlib.contextmanager
def ray_session(*, actors: int, cpus_per_actor: float) -> Iterator[None]:
    """Connect to the Ray we run on, else start one on this machine's loopback; leave it at the end.

    Args:
        actors: how many actors will be asked for.
        cpus_per_actor: CPUs of each, which a Ray started here is given.

    Raises:
        StorageError: the running Ray does not answer or refuses us.
    """
    running = on_running_ray()
    if not running:
        # Read when ray is imported. The token is of this run alone and is in no file: other users
        # of the machine reach its loopback too.
        os.environ.update(LOCAL_ENVIRONMENT)
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if not running:
        options |= {
            "address": "local",
            "num_cpus": math.ceil(actors * cpus_per_actor),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}" if running else "on this machine"
        raise StorageError(
            f"Ray {where} cannot be used: {' '.join(str(error).split())[:300]}; start it, or score "
            "in this process with scoring.use_ray false"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


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


Call = tuple[str, tuple[object, ...]]
"""A method of `ScoringActor` and its arguments."""

POLL_S = 0.5
"""How often the driver looks whether it was asked to stop."""

UNDER_WAY = 2
"""Shards that an actor works on at a time."""

LATE_S = 10.0
LATE_TIMES = 3.0
"""A shard under way for more than `LATE_S`, and this many times as long as any that was finished,
is late: the backup tasks of MapReduce (Dean and Ghemawat 2004, section 3.6)."""

OPEN: Call = ("open", ())
ANSWER: Call = ("answer", ())
ABOUT_SHARDS = ("score", "check")


class Given(NamedTuple):
    """A call that an actor works on, since when (monotonic seconds)."""

    actor: Any
    call: Call
    since: float


class ScoringActor:
    """One scoring process. Opens in a call of its own, so that errors arrive with their type."""

    def __init__(self, job: ScoringJob) -> None:
        self.job = job
        self.scorer: ShardScorer | None = None

    def open(self) -> int:
        """Load dataset and model; returns the process id, for the driver's log."""
        self.scorer = ShardScorer(self.job)
        return os.getpid()

    def answer(self) -> None:
        """Show that it lives."""

    def warm_up(
        self, split: str, shard: int, batch_size: int | None, decode_threads: int | None
    ) -> WarmUp:
        """See `ShardScorer.warm_up`."""
        return self._opened().warm_up(split, shard, batch_size, decode_threads)

    def prepare_text(self, settings: ScoreSettings) -> int:
        """See `ShardScorer.prepare_text`."""
        return self._opened().prepare_text(settings)

    def score(self, split: str, shard: int, settings: ScoreSettings) -> ShardResult:
        """See `ShardScorer.score`."""
        return self._opened().score(split, shard, settings)

    def check(self, split: str, shard: int) -> ShardResult:
        """See `ShardScorer.check`."""
        return self._opened().check(split, shard)

    def _opened(self) -> ShardScorer:
        assert self.scorer is not None
        return self.scorer


class ActorPool:
    """A fixed number of actors that work off calls; use inside `ray_session`.

    Args:
        job: what the actors score.
        size: number of actors.
        cpus_per_actor: CPUs each asks for.
        gpus_per_actor: GPUs each asks for (0 on device cpu).
        max_retries: attempts after a lost actor, per call.
        stopped: asked every `POLL_S`.

    Attributes:
        retried: calls given out again, after a lost actor or because they were late.
    """

    def __init__(
        self,
        job: ScoringJob,
        *,
        size: int,
        cpus_per_actor: float,
        gpus_per_actor: float,
        max_retries: int,
        stopped: Callable[[], bool],
    ) -> None:
        import ray

        self._ray = ray
        # max_restarts 0: the driver replaces a lost actor itself, which bounds attempts per shard
        # and leaves Ray no queue of its own.
        options: Any = {
            "num_cpus": cpus_per_actor,
            "num_gpus": gpus_per_actor,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": UNDER_WAY,
        }
        self._actor_class: Any = ray.remote(**options)(ScoringActor)
        self._job, self._max_retries, self._stopped = job, max_retries, stopped
        self._idle: deque[Any] = deque()  # an actor stands here once for each shard it can take
        self._busy: dict[Any, Given] = {}
        self._lost: Counter[Call] = Counter()
        self.retried = 0
        self._metrics = RayMetrics(run=job.scores)
        self._warn_if_unplaceable(size, gpus_per_actor)
        for _ in range(size):
            self._start()

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results of the calls as they finish, in any order, one of each.

        Raises:
            VlalError: what a call raised; or a call whose actor was lost too often.
            Stopped: `stopped()` became true.
        """
        queue, left = deque(calls), set(calls)
        longest: float | None = None
        self._metrics.pending(sum(method in ABOUT_SHARDS for method, _ in calls))
        while left:
            while queue and self._idle:
                call = queue.popleft()
                if call in left:  # else its late actor has answered meanwhile
                    # The one that has waited longest: a second shard only where all have a first.
                    self._submit(self._idle.popleft(), call)
            for given, reference in self._ready():
                try:
                    result = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    cause = _cause(error)
                    if given.call != OPEN or not isinstance(cause, StorageError):
                        raise cause from None
                    # A node that has just come up may not reach the store yet.
                    queue.extendleft(self._replace(given, cause, left))
                    continue
                except self._ray.exceptions.RayError as error:
                    queue.extendleft(self._replace(given, error, left))
                    continue
                if given.call == OPEN:
                    logger.info("an actor is ready, process %d", result)
                    self._idle.extend([given.actor] * UNDER_WAY)
                    self._lost[OPEN] = 0
                    continue
                self._idle.append(given.actor)
                if given.call in left:
                    left.remove(given.call)
                    longest = max(longest or 0.0, time.monotonic() - given.since)
                    self._metrics.publish(result, left=len(left), retried=self.retried)
                    yield result
            if longest is not None and not queue:
                queue.extend(self._late(left, max(LATE_S, LATE_TIMES * longest)))

    def _ready(self) -> list[tuple[Given, Any]]:
        if self._stopped():
            raise Stopped("stopped; committed shards are kept, the same command scores the rest")
        done, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=POLL_S)
        return [(self._busy.pop(reference), reference) for reference in done]

    def _start(self) -> None:
        self._submit(self._actor_class.remote(self._job), OPEN)

    def _submit(self, actor: Any, call: Call) -> None:
        method, arguments = call
        reference = getattr(actor, method).remote(*arguments)
        self._busy[reference] = Given(actor, call, time.monotonic())

    def _late(self, left: Collection[Call], allowed_s: float) -> list[Call]:
        """Calls of `left` whose newest attempt has taken longer than it may, to be given out once
        more: their actors may hang, or only be slow.
        """
        newest: dict[Call, float] = {}
        for given in self._busy.values():
            if given.call in left:
                newest[given.call] = max(given.since, newest.get(given.call, 0.0))
        now = time.monotonic()
        late = [call for call, since in newest.items() if now - since > allowed_s]
        for call in late:
            logger.warning(
                "%s has taken %.0f s and is given out again; the first answer counts",
                _name(call),
                now - newest[call],
            )
        self.retried += len(late)
        return late

    def _replace(self, lost: Given, error: Exception, left: Collection[Call]) -> list[Call]:
        """Put a new actor in the place of a lost one, which is ended if it still lives.

        Returns:
            What it was working on and is still `left`, to be given out again.
        """
        calls = [lost.call]
        for reference, other in list(self._busy.items()):
            if other.actor == lost.actor:
                del self._busy[reference]
                calls.append(other.call)
        self._ray.kill(lost.actor)
        self._start()
        # Others of its node may be lost with it. Idle ones are asked, not tried out with shards, of
        # which each may be lost a few times only.
        self._idle = deque(one for one in self._idle if one != lost.actor)
        while self._idle:
            self._submit(self._idle.popleft(), ANSWER)
        again = [call for call in calls if call in left]
        reason = " ".join(str(error).split())[:300]
        self._count_loss(again + [call for call in calls if call == OPEN], reason)
        return again

    def _count_loss(self, lost: Sequence[Call], reason: str) -> None:
        for call in lost:
            self._lost[call] += 1
            if self._lost[call] > self._max_retries:
                raise VlalError(
                    f"{_name(call)}: its actor was lost {self._lost[call]} times (last: {reason}); "
                    "correct the cause (often memory: fewer actors on a node, or a smaller "
                    "scoring.batch_size in a new paths.scores) and run the same command again"
                )
            self.retried += call != OPEN
            logger.warning("an actor was lost at %s, a new one takes over: %s", _name(call), reason)

    def _warn_if_unplaceable(self, size: int, gpus_per_actor: float) -> None:
        resources: dict[str, float] = self._ray.cluster_resources()  # type: ignore[no-untyped-call]
        there = resources.get("GPU", 0.0)
        if gpus_per_actor * size > there:
            logger.warning(
                "%d actors ask for %g GPUs, Ray has %g at present: the others wait for an "
                "autoscaler. On a cluster without GPUs give --scoring.device cpu",
                size,
                gpus_per_actor * size,
                there,
            )


def _cause(error: Any) -> BaseException:
    """The exception raised inside the actor; of ours, without Ray's copy of the traceback."""
    cause = error.cause
    return cause if isinstance(cause, VlalError) else error


def _name(call: Call) -> str:
    method, arguments = call
    return " ".join([method, *map(str, arguments[:2])])
