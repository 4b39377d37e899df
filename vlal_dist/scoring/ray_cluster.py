"""Scoring on Ray: connect to a cluster or start one, run actors, export metrics.

Shards are handed out to actors that are ready, two at a time (one is fetched and decoded while the
other is encoded), so a pending actor (no free GPU yet: the demand that autoscalers see) holds no
work. A lost actor is replaced, and its shards go first in the queue again, at most `max_retries`
times. When all are handed out, a shard that takes much longer than others is handed out once more:
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
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from vlal_dist.errors import ConfigError, Stopped, StorageError, VlalError
from vlal_dist.observability.metric_definitions import SCORE
from vlal_dist.processes import die_with_parent
from vlal_dist.scoring.identity import ScoringJob
from vlal_dist.scoring.shard_task import ShardResult
from vlal_dist.scoring.worker import ShardScorer

logger = logging.getLogger(__name__)

LOCAL_ENVIRONMENT = {
    # Despite its name: 0 keeps every listener of a Ray started here on 127.0.0.1 (ray 2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Events of every call are for a dashboard, which is not started: 3 kB a shard in Ray's store.
    "RAY_task_events_report_interval_ms": "0",
}
OBJECT_STORE_BYTES = 100_000_000
"""Nothing large passes through the object store; Ray refuses less than 75 MB."""


def on_running_ray() -> bool:
    """Whether this process uses a Ray that is already running (`ray job submit`, RAY_ADDRESS).

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
    """Refuse a relative path in a Ray job with a working directory: it runs in a copy of that.

    Args:
        name: key or flag that gives the path.
        path: of input or output.

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
def ray_session(*, actors: int, cpus_per_actor: float, stop: Event | None = None) -> Iterator[None]:
    """Connect to the running Ray, else start one on this machine's loopback; leave it at the end.

    Args:
        actors, cpus_per_actor: what a Ray started here must have room for.
        stop: looked at while the running Ray is waited for.

    Raises:
        StorageError: the running Ray does not answer or refuses us; one cannot be started here.
        Stopped: `stop` was set, or a signal came meanwhile.
    """
    running = on_running_ray()
    if running and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a job's Ray is there
        try_connecting(stop or Event())
    if not running:
        # Read when ray is imported. The token is of this run alone and is in no file: other users
        # of the machine can reach its loopback too.
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
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise _unusable(str(error), running=running) from None
    except SystemExit:  # of Ray's own handler of SIGTERM
        raise Stopped("stopped while Ray was starting; repeat the command") from None
    try:
        yield
    finally:
        ray.shutdown()


CONNECT_S = 40.0
"""Seconds in which a running Ray must take a connection."""

CONNECT = """
import os, socket
host, _, port = os.environ["RAY_ADDRESS"].rpartition("://")[2].rpartition(":")
if host and port.isdigit():  # what refuses, or drops packets, is found at once
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
import ray
ray.init(logging_level="ERROR", log_to_driver=False)
ray.shutdown()
"""


def try_connecting(stop: Event) -> None:
    """Connect to the running Ray once in a process that can be ended: `ray.init` waits for minutes
    in C++, where no signal is seen.

    Raises:
        StorageError: it does not answer within `CONNECT_S`, or refuses us.
        Stopped: `stop` was set.
    """
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-c", CONNECT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            preexec_fn=die_with_parent,
        )
        try:
            deadline = time.monotonic() + CONNECT_S
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(POLL_S)
                    break
                if stop.is_set():
                    raise Stopped("stopped while waiting for Ray; repeat the command")
                if time.monotonic() > deadline:
                    raise _unusable(f"no connection in {CONNECT_S:g} s", running=True)
        finally:
            child.kill()
            child.wait()
        if code != 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise _unusable(lines[-1] if lines else f"exit code {code}", running=True)


def _unusable(reason: str, *, running: bool) -> StorageError:
    """Why Ray cannot be used, and what to do."""
    reason = " ".join(reason.split())[:300]
    if running:
        return StorageError(
            f"Ray at RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be used: {reason}; start it or "
            "correct the address; or unset RAY_ADDRESS, and a Ray is started on this machine; or "
            "score in this process with scoring.use_ray false"
        )
    if "AF_UNIX" in reason:
        return StorageError(
            f"Ray cannot be started here: its sockets lie below the folder for temporary files, "
            f"{os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()}, whose path is too long for "
            "them; set RAY_TMPDIR to a short one, such as /tmp, or score in this process with "
            "scoring.use_ray false"
        )
    return StorageError(
        f"Ray cannot be started on this machine: {reason}; score in this process with "
        "scoring.use_ray false"
    )


Call = tuple[str, tuple[object, ...]]
"""A method of `ShardScorer` and its arguments."""

UNDER_WAY = 2
"""Shards that a worker scores at a time."""

POLL_S = 0.5
"""How often the driver looks at `stop`."""

LATE_S = 10.0
LATE_TIMES = 3.0
"""A shard under way for more than `LATE_S`, and this many times as long as any that was finished,
is late: the backup tasks of MapReduce (Dean and Ghemawat 2004, section 3.6)."""

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
