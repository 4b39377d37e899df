"""Ray for every program: connect to a running one or start one, and run tasks on it.

A task is a module's function and one argument; only arguments and results pass through Ray. Ray
repeats nothing by itself: the driver hands a lost task out again, a few times, so what a task
writes must be equal in every attempt, and committed create-only.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

from vlal_dist.errors import ConfigError, Stopped, StorageError, UsageError, VlalError
from vlal_dist.processes import die_with_parent
from vlal_dist.storage.store import open_store

logger = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL_S = 0.5
"""How often the driver looks at `stop`."""

LATE_S = 10.0
LATE_TIMES = 3.0
"""A task under way for more than `LATE_S`, and this many times as long as any that was finished,
is late: the backup tasks of MapReduce (Dean and Ghemawat 2004, section 3.6)."""

LOCAL_ENVIRONMENT = {
    # Despite its name: 0 keeps every listener of a Ray started here on 127.0.0.1 (ray 2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Events of every call are for a dashboard, which is not started: 3 kB a shard in Ray's store.
    "RAY_task_events_report_interval_ms": "0",
}
WITHOUT = "work without Ray (score: scoring.use_ray false; others: --engine local)"
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
            "python -m vlal_dist COMMAND ...`, or unset it to start a local Ray"
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
            f"{WITHOUT}"
        )
    if "AF_UNIX" in reason:
        return StorageError(
            f"Ray cannot be started here: its sockets lie below the folder for temporary files, "
            f"{os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()}, whose path is too long for "
            f"them; set RAY_TMPDIR to a short one, such as /tmp, or {WITHOUT}"
        )
    return StorageError(f"Ray cannot be started on this machine: {reason}; {WITHOUT}")


LOST_TIMES = 3
"""Times that a task may be lost with its node or process; the next time ends the run."""
CPUS_S = 10.0
"""How often the CPUs of the Ray are counted: an autoscaler may add nodes."""
PROBE_S = 10.0
"""Seconds that a new file may take to be seen by all nodes: NFS keeps what it knows for a while."""
PROBE_BYTES = 65_536


def wants_ray(flags: Mapping[str, str]) -> bool:
    """Whether `--engine` is ray; absent: local.

    Raises:
        UsageError: another word.
    """
    engine = flags.get("engine", "local")
    if engine not in ("local", "ray"):
        raise UsageError(
            f"--engine {engine!r}: give local (processes of this machine) or ray (tasks on the Ray "
            "at RAY_ADDRESS, else on one that is started here)"
        )
    return engine == "ray"


def run_on_ray(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    label: str,
    stop: Event,
    most: int = 0,
) -> Iterator[Result]:
    """Results of one-CPU tasks, in the order of the tasks; use inside `ray_session`.

    Twice as many as the Ray has CPUs are with it at a time; a task is taken when it is handed out.
    One that is late (`LATE_S`) takes no other's room; with none left it is handed out once more,
    and the first answer counts: Ray may wait minutes for a host that lost power.

    Args:
        work: a module's function, run on the nodes.
        tasks: its arguments.
        label: names the tasks in errors.
        stop: looked at every `POLL_S`.
        most: tasks under way at a time; 0: as the Ray has room.

    Raises:
        VlalError: what the first task in order raised; or a task was lost too often.
        Stopped: `stop` was set.
    """
    import ray

    remote: Any = ray.remote(num_cpus=1, max_retries=0)(work)
    numbered = enumerate(tasks)
    busy: dict[Any, _Given] = {}
    longest, repeated = math.inf, set[int]()
    again: deque[tuple[int, Task]] = deque()
    found: dict[int, Result | Exception] = {}  # what is not yielded yet
    lost: Counter[int] = Counter()
    room, counted, failed, done, position = 0, -math.inf, math.inf, False, 0
    try:
        while True:
            if time.monotonic() - counted > CPUS_S:
                cpus: float = ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
                room, counted = most or max(2, 2 * int(cpus)), time.monotonic()
            allowed_s = max(LATE_S, LATE_TIMES * longest)
            late = [one for one in busy.values() if time.monotonic() - one.since > allowed_s]
            while len(busy) - len(late) < room and not (done and not again):
                one = again.popleft() if again else next(numbered, None)
                if one is None or one[0] > failed:
                    done = True  # after an error only what comes before it matters
                    continue
                busy[remote.remote(one[1])] = _Given(*one, time.monotonic())
            if all(one.number < position for one in busy.values()):
                return
            for number, task, _ in late if done else ():
                if number >= position and number not in repeated | found.keys():
                    logger.warning("%s: task %d is late, and is repeated", label, number)
                    repeated.add(number)
                    busy[remote.remote(task)] = _Given(number, task, time.monotonic())
            if stop.is_set():
                raise Stopped(f"stopped; repeat the command: {label} keeps what is done")
            for reference in ray.wait(list(busy), num_returns=1, timeout=POLL_S)[0]:
                number, task, since = busy.pop(reference)
                if number < position or number in found:
                    continue  # its other attempt was the first
                try:
                    found[number] = _answer(reference)
                except ray.exceptions.RayError as error:
                    lost[number] += 1
                    _check_lost(f"{label}: task {number}", lost[number], error)
                    again.append((number, task))
                    continue
                if isinstance(found[number], Exception):
                    failed = min(failed, number)
                longest = max(time.monotonic() - since, 0.0 if longest == math.inf else longest)
            while position in found:
                result = found.pop(position)
                if isinstance(result, Exception):
                    raise result from None
                yield result
                position += 1
    finally:
        for reference in busy:
            ray.cancel(reference, force=True)


class _Given(NamedTuple):
    """A task that Ray has, by its number, and since when (monotonic seconds)."""

    number: int
    task: Any
    since: float


def _answer(reference: Any) -> Any:
    """What a task returned, or the exception that it raised; RayError where it was lost."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, (VlalError, OSError)) else error


def _check_lost(task: str, times: int, error: Exception) -> None:
    """Log that a task is repeated; VlalError after too many times."""
    reason = " ".join(str(error).split())[:300]
    if times > LOST_TIMES:
        raise VlalError(
            f"{task} was lost {times} times with its process or node (last: {reason}); correct the "
            "cause (often memory) and repeat the command: what is finished is kept"
        ) from None
    logger.warning("%s was lost, and is repeated: %s", task, reason)


def check_shared(
    written: Mapping[str, str], read: Mapping[str, str], *, stop: Event | None = None
) -> None:
    """Refuse local paths that other nodes of the Ray do not see; use inside `ray_session`.

    Args:
        written: setting -> root to write; a file is created there for the time being.
        read: setting -> file or folder; of a folder, an entry must be there on each node.
        stop: looked at while nodes answer.

    Raises:
        ConfigError: a node lacks a path, or has another file there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]  # type: ignore[no-untyped-call]
    probes: list[Path] = []
    wanted: list[tuple[str, str, str, bytes | None]] = []
    if len(nodes) < 2:
        return
    try:
        for setting, place in written.items():
            if (root := _local_root(place)) is None:
                continue
            token = secrets.token_hex(16)
            store = open_store(str(root))
            root.mkdir(parents=True, exist_ok=True)
            probes.append(root / f".vlal-tmp-probe-{token}")
            probes[-1].write_text(token)
            wanted.append((setting, store.url, str(probes[-1]), token.encode()))
        for setting, place in read.items():
            if (root := _local_root(place)) is not None and root.exists():
                wanted.append((setting, str(root), *_witness(root)))
        if not wanted:
            return
        remote: Any = ray.remote(num_cpus=0, max_retries=0)(_first_unseen)
        arguments = [(path, content) for _, _, path, content in wanted]
        asked = {}
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            reference = remote.options(scheduling_strategy=strategy).remote(arguments)
            asked[reference] = node["NodeManagerAddress"]
        while asked:
            if stop is not None and stop.is_set():
                raise Stopped("stopped; repeat the command")
            for reference in ray.wait(list(asked), num_returns=1, timeout=POLL_S)[0]:
                address = asked.pop(reference)
                try:
                    unseen = ray.get(reference)
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError:
                    continue  # a node that is lost meanwhile gets no work
                if unseen is not None:
                    setting, place, _, _ = wanted[unseen]
                    raise ConfigError(
                        f"{setting} {place} is not on every node: {address} does not see what this "
                        "machine has there; give s3://, or a folder that all nodes share at the "
                        "same path, or work on one machine without RAY_ADDRESS"
                    )
    finally:
        for probe in probes:
            probe.unlink(missing_ok=True)


def _local_root(place: str) -> Path | None:
    """An absolute local path; None: on S3."""
    url = open_store(place).url
    return None if "://" in url else Path(url)


def _witness(path: Path) -> tuple[str, bytes | None]:
    """A path that shows on another node that `path` is there, and its first bytes."""
    if path.is_dir():
        with os.scandir(path) as entries:
            return min((entry.path for entry in entries), default=str(path)), None
    with path.open("rb") as file:
        return str(path), file.read(PROBE_BYTES)


def _first_unseen(wanted: list[tuple[str, bytes | None]]) -> int | None:
    """The position of the first path that this node lacks or has with other bytes."""
    deadline = time.monotonic() + PROBE_S
    for position, (path, content) in enumerate(wanted):
        while not _seen(path, content):
            if time.monotonic() > deadline:
                return position
            time.sleep(POLL_S)
    return None


def _seen(path: str, content: bytes | None) -> bool:
    try:
        if content is None:
            return Path(path).exists()
        with Path(path).open("rb") as file:
            return file.read(PROBE_BYTES) == content
    except OSError:
        return False
