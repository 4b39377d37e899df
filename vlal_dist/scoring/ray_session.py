"""The Ray that scoring runs on: the one this process was submitted to, else one started here."""

import contextlib
import json
import logging
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlal_dist.errors import ConfigError, StorageError

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
