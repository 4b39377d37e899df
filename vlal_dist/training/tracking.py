"""Which trackers a run has beside its own log, and under which name they know it."""

import importlib.util
import json
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from vlal_dist.errors import ConfigError, NotFoundError, VlalError
from vlal_dist.observability.metrics import TrainMetrics
from vlal_dist.observability.tracker_process import ProcessTracker
from vlal_dist.observability.trackers import Tracker, Trackers
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)

IDENTITY = "trackers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot work here, before a run is touched.

    Raises:
        ConfigError: a library is not installed, or MLflow has no address.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name is no package
            raise ConfigError(
                f"observability.trackers has {name}, which is not installed; "
                "run pip install 'vlal-dist[trackers]', or take it off the list"
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "observability.trackers has mlflow, but MLFLOW_TRACKING_URI is not set; "
            "export MLFLOW_TRACKING_URI=http://HOST:PORT"
        )


def open_trackers(
    stack: ExitStack, names: Sequence[str], *, store: Store, step: int, metrics: TrainMetrics
) -> Trackers:
    """Start the trackers of a run; of rank 0 alone.

    Args:
        stack: closes them.
        names: those of the settings.
        store: the run root.
        step: that the run starts from; 0: the trackers begin a new run, else they go on with it.
        metrics: told what was dropped.
    """
    local = store.local_path(IDENTITY)
    starts: dict[str, Callable[[], Tracker]] = {}
    if clients := [name for name in ("wandb", "mlflow") if name in names]:
        identity = identity_of(store, step=step)
        folder = local.parent if local else None
        for name in clients:
            starts[name] = partial(ProcessTracker, name, identity=identity, folder=folder)
    if "tensorboard" in names:
        if local:
            starts["tensorboard"] = partial(_event_files, local.parent / "tensorboard", step=step)
        else:
            logger.info("tensorboard: its files are local ones; none for %s", store.url)
    trackers = Trackers(starts, dropped=metrics.tracker_dropped)
    stack.push(lambda kind, *_: trackers.close(done=kind is None))
    return trackers


def _event_files(folder: Path, *, step: int) -> Tracker:
    from vlal_dist.observability.event_files import EventFiles

    return EventFiles(folder, step=step)


def identity_of(store: Store, *, step: int) -> str:
    """The name under which W&B and MLflow know this run, the same at every resume.

    Args:
        store: the run root, where it is kept.
        step: that the run starts from; at 0 it gets a new name.
    """
    try:
        if step:
            return str(json.loads(store.read(IDENTITY))["identity"])
    except NotFoundError:
        pass  # the run began without them
    except (VlalError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: %s; the trackers begin a new run", IDENTITY, error)
    identity = secrets.token_hex(8)
    try:
        store.replace(IDENTITY, (json.dumps({"identity": identity}) + "\n").encode())
    except VlalError as error:
        logger.warning("%s: %s; a resume will begin a new run in the trackers", IDENTITY, error)
    return identity
