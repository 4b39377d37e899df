"""Where Ray places, retries and counts the scoring of shards. The only importer of ray.

Shards are handed out to actors that are ready, two at a time (one is fetched and decoded while the
other is encoded), so a pending actor (no free GPU yet: the demand that autoscalers see) holds no
work. A lost actor is replaced, and its shards go first in the queue again, at most `max_retries`
times. Nothing else is needed: a score file is committed create-only under a name made of digests,
so a shard scored twice is one file. Only job descriptions, counts and the similarities of annotated
pairs pass through Ray; crops, scores and credentials never do.
"""

import contextlib
import logging
import math
import os
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vlal_dist.errors import ConfigError, Stopped, StorageError, VlalError
from vlal_dist.scoring.identity import ScoreSettings
from vlal_dist.scoring.result import ShardResult
from vlal_dist.scoring.warm_up import WarmUp
from vlal_dist.scoring.worker import ScoringJob, ShardScorer

logger = logging.getLogger(__name__)

Call = tuple[str, tuple[object, ...]]
"""A method of `ScoringActor` and its arguments."""

LOCAL_ENVIRONMENT = {
    # Despite its name: 0 keeps every listener of a Ray started here on 127.0.0.1 (ray 2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
OBJECT_STORE_BYTES = 100_000_000
"""Nothing large passes through it; Ray refuses less than 75 MB."""

POLL_S = 0.5
"""How often the driver looks whether it was asked to stop."""

UNDER_WAY = 2
"""Shards that an actor works on at a time."""

OPEN: Call = ("open", ())
ANSWER: Call = ("answer", ())


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
        retried: calls given out again after a lost actor.
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
        self._busy: dict[Any, tuple[Any, Call]] = {}
        self._lost: Counter[Call] = Counter()
        self.retried = 0
        self._warn_if_unplaceable(size, gpus_per_actor)
        for _ in range(size):
            self._start()

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results of the calls as they finish, in any order.

        Raises:
            VlalError: what a call raised; or a call whose actor was lost too often.
            Stopped: `stopped()` became true.
        """
        queue, left = deque(calls), len(calls)
        while left:
            while queue and self._idle:
                # The one that has waited longest: a second shard only where all have a first.
                self._submit(self._idle.popleft(), queue.popleft())
            for actor, call, reference in self._ready():
                try:
                    result = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    raise _cause(error) from None
                except self._ray.exceptions.RayError as error:
                    queue.extendleft(self._replace(actor, call, error))
                    continue
                if call == OPEN:
                    logger.info("an actor is ready, process %d", result)
                    self._idle.extend([actor] * UNDER_WAY)
                    continue
                self._idle.append(actor)
                if call != ANSWER:
                    left -= 1
                    yield result

    def _ready(self) -> list[tuple[Any, Call, Any]]:
        if self._stopped():
            raise Stopped("stopped; committed shards are kept, the same command scores the rest")
        done, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=POLL_S)
        return [(*self._busy.pop(reference), reference) for reference in done]

    def _start(self) -> None:
        self._submit(self._actor_class.remote(self._job), OPEN)

    def _submit(self, actor: Any, call: Call) -> None:
        method, arguments = call
        self._busy[getattr(actor, method).remote(*arguments)] = (actor, call)

    def _replace(self, actor: Any, call: Call, error: Exception) -> list[Call]:
        """Put a new actor in the place of a lost one, which is ended if it still lives.

        Returns:
            What it was working on, to be given out again.
        """
        lost = [call]
        for reference, (other, others_call) in list(self._busy.items()):
            if other == actor:
                del self._busy[reference]
                lost.append(others_call)
        self._ray.kill(actor)
        self._start()
        # Others of its node may be lost with it. Idle ones are asked, not tried out with shards, of
        # which each may be lost a few times only.
        self._idle = deque(one for one in self._idle if one != actor)
        while self._idle:
            self._submit(self._idle.popleft(), ANSWER)
        self._count_loss(lost, " ".join(str(error).split())[:300])
        return [one for one in lost if one not in (OPEN, ANSWER)]

    def _count_loss(self, lost: Sequence[Call], reason: str) -> None:
        for call in lost:
            if call == ANSWER:
                continue
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
