"""Scoring on Ray: run actors, export metrics.

Shards are handed out to actors that are ready, two at a time (one is fetched and decoded while the
other is encoded), so a pending actor (no free GPU yet: the demand that autoscalers see) holds no
work. A lost actor is replaced, and its shards go first in the queue again, at most `max_retries`
times. When all are handed out, a shard that takes much longer than others is handed out once more:
its actor may hang without being lost. Nothing else is needed: a score file is committed create-only
under a name made of digests, so a shard scored twice is one file. Only job descriptions, counts and
the similarities of annotated pairs pass through Ray; crops, scores and credentials never do.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from threading import Event
from typing import Any, NamedTuple

from vlal_dist.errors import Stopped, StorageError, VlalError
from vlal_dist.observability.metric_definitions import SCORE
from vlal_dist.ray_tasks import LATE_S, LATE_TIMES, POLL_S
from vlal_dist.scoring.identity import ScoringJob
from vlal_dist.scoring.shard_task import ShardResult
from vlal_dist.scoring.worker import ShardScorer

logger = logging.getLogger(__name__)

Call = tuple[str, tuple[object, ...]]
"""A method of `ShardScorer` and its arguments."""

UNDER_WAY = 2
"""Shards that a worker scores at a time."""

OPEN: Call = ("open", ())
PING: Call = ("ping", ())


class Given(NamedTuple):
    """A call that an actor works on, since when (monotonic seconds)."""

    actor: Any
    call: Call
    since: float


class ScoringActor:
    """A `ShardScorer` in a process of its own.

    It is opened by its first call, not by the constructor, so that errors arrive with their type.
    """

    def __init__(self, job: ScoringJob) -> None:
        self.job = job

    def open(self) -> int:
        """Load dataset and model; returns the process id, for the driver's log."""
        self.scorer = ShardScorer(self.job)
        return os.getpid()

    def ping(self) -> None:
        """Return, to show that the process lives."""

    def work(self, method: str, *arguments: object) -> Any:
        """Call a method of the scorer."""
        return getattr(self.scorer, method)(*arguments)


class ActorPool:
    """A fixed number of actors that work off calls; use inside `ray_session`.

    Args:
        job: what the actors score; `scoring` has the resources of each and `max_retries`.
        size: number of actors.
        stop: looked at every `POLL_S`.

    Attributes:
        retried: calls handed out again, after a lost actor or because they were late.
    """

    def __init__(self, job: ScoringJob, *, size: int, stop: Event) -> None:
        import ray

        self._ray, self._job, self._stop = ray, job, stop
        gpus = job.scoring.gpus_per_actor if job.device == "cuda" else 0.0
        # max_restarts 0: the driver replaces a lost actor itself, which bounds attempts per shard
        # and leaves Ray no queue of its own.
        options: Any = {
            "num_cpus": job.scoring.cpus_per_actor,
            "num_gpus": gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": UNDER_WAY,
        }
        self._actor_class: Any = ray.remote(**options)(ScoringActor)
        self._idle: deque[Any] = deque()  # an actor is in it once for each shard it can take
        self._busy: dict[Any, Given] = {}
        self._lost: Counter[Call] = Counter()
        self.retried = 0
        self._metrics = RayMetrics(run=job.scores)
        there: float = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
        if gpus * size > there:
            logger.warning(
                "%d actors need %g GPUs, Ray has %g at present: the others wait for an "
                "autoscaler. On a cluster without GPUs give --scoring.device cpu",
                size,
                gpus * size,
                there,
            )
        for _ in range(size):
            self._start()

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results of the calls as they finish, in any order, one of each.

        Raises:
            VlalError: what a call raised; or a call whose actor was lost too often.
            Stopped: `stop` was set.
        """
        queue, left = deque(calls), set(calls)
        longest: float | None = None
        self._metrics.pending(sum(method in ("score", "check") for method, _ in calls))
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
                    # An error of this project goes on without Ray's copy of the traceback.
                    cause = error.cause if isinstance(error.cause, VlalError) else error
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
                    if isinstance(result, ShardResult):
                        self._metrics.publish(result, left=len(left), retried=self.retried)
                    yield result
            if longest is not None and not queue:
                queue.extend(self._late(left, max(LATE_S, LATE_TIMES * longest)))

    def _ready(self) -> list[tuple[Given, Any]]:
        """Calls that have ended since, with Ray's references; waits for one, `POLL_S` at most."""
        if self._stop.is_set():
            raise Stopped("stopped; repeat the command to score the remaining shards")
        done, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=POLL_S)
        return [(self._busy.pop(reference), reference) for reference in done]

    def _start(self) -> None:
        self._submit(self._actor_class.remote(self._job), OPEN)

    def _submit(self, actor: Any, call: Call) -> None:
        method, arguments = call
        if call in (OPEN, PING):
            reference = getattr(actor, method).remote()
        else:
            reference = actor.work.remote(method, *arguments)
        self._busy[reference] = Given(actor, call, time.monotonic())

    def _late(self, left: Collection[Call], allowed_s: float) -> list[Call]:
        """Calls of `left` whose newest attempt has taken longer than allowed, to be handed out once
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
                "%s has taken %.0f s and is handed out again; the first answer counts",
                _name(call),
                now - newest[call],
            )
        self.retried += len(late)
        return late

    def _replace(self, lost: Given, error: Exception, left: Collection[Call]) -> list[Call]:
        """Put a new actor in the place of a lost one, which is ended if it still lives.

        Returns:
            Its calls that are still `left`, to be handed out again.
        """
        calls = [lost.call]
        for reference, other in list(self._busy.items()):
            if other.actor == lost.actor:
                del self._busy[reference]
                calls.append(other.call)
        self._ray.kill(lost.actor)
        self._start()
        # Others of its node may be lost with it. Idle ones are pinged, not tried with shards, of
        # which each may be lost a few times only.
        self._idle = deque(one for one in self._idle if one != lost.actor)
        while self._idle:
            self._submit(self._idle.popleft(), PING)
        again = [call for call in calls if call in left]
        reason = " ".join(str(error).split())[:300]
        for call in [*again, *(call for call in calls if call == OPEN)]:
            self._lost[call] += 1
            if self._lost[call] > self._job.scoring.max_retries:
                raise VlalError(
                    f"{_name(call)}: its actor was lost {self._lost[call]} times (last: {reason}); "
                    "correct the cause (often memory: fewer actors on a node, or a smaller "
                    "scoring.batch_size in a new paths.scores) and run the same command again"
                )
            self.retried += call != OPEN
            logger.warning("an actor was lost at %s, a new one takes over: %s", _name(call), reason)
        return again


def _name(call: Call) -> str:
    method, arguments = call
    return " ".join([method, *map(str, arguments[:2])])


class RayMetrics:
    """The metrics `SCORE`, served by Ray's nodes; create it where Ray is connected.

    The counts of a driver's last seconds may be lost when it ends (ray#39212); its summary is
    exact.

    Args:
        run: the score root, which labels all of them.
    """

    def __init__(self, *, run: str) -> None:
        from ray.util import metrics

        self._metrics: dict[str, Any] = {}
        kinds: dict[str, Any] = {"counter": metrics.Counter, "gauge": metrics.Gauge}
        for name, metric in SCORE.items():
            # Ray puts `ray_` before the names, and `_total` after those of counters.
            plain = name.removeprefix("ray_").removesuffix("_total")
            self._metrics[name] = kinds[metric.kind](plain, metric.text, tuple(metric.labels))
            self._metrics[name].set_default_tags({"run": run})
        self._retried = 0

    def pending(self, shards: int) -> None:
        """Set the number of shards that have no result."""
        self._metrics["ray_vlal_score_shards_pending"].set(shards)

    def publish(self, result: ShardResult, *, left: int, retried: int) -> None:
        """Count the result of a shard.

        Args:
            result: of the shard.
            left: calls without a result.
            retried: calls handed out again so far.
        """
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
        if amount > 0:  # Ray refuses to add 0
            self._metrics[name].inc(amount, tags=labels)
