"""Where Ray places, retries and counts the scoring of shards.

Shards are handed out to actors that are ready, two at a time (one is fetched and decoded while the
other is encoded), so a pending actor (no free GPU yet: the demand that autoscalers see) holds no
work. A lost actor is replaced, and its shards go first in the queue again, at most `max_retries`
times. When all are given out, a shard that takes much longer than others is given out once more:
its actor may hang without being lost. Nothing else is needed: a score file is committed create-only
under a name made of digests, so a shard scored twice is one file. Only job descriptions, counts and
the similarities of annotated pairs pass through Ray; crops, scores and credentials never do.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from vlal_dist.errors import Stopped, StorageError, VlalError
from vlal_dist.scoring.identity import ScoreSettings
from vlal_dist.scoring.ray_metrics import RayMetrics
from vlal_dist.scoring.result import ShardResult
from vlal_dist.scoring.warm_up import WarmUp
from vlal_dist.scoring.worker import ScoringJob, ShardScorer

logger = logging.getLogger(__name__)

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
