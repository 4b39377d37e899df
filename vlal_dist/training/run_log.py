"""What a run reports while it trains: metrics, metrics.jsonl, trackers, log lines."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

import vlal_dist
from vlal_dist import __version__
from vlal_dist.errors import ConfigError, NotFoundError, Stopped, VlalError
from vlal_dist.observability.metrics import TrainMetrics
from vlal_dist.observability.metrics_log import MetricsLog, lines_until
from vlal_dist.observability.prometheus_files import Target
from vlal_dist.observability.tracker_process import ProcessTracker
from vlal_dist.observability.trackers import Tracker, Trackers
from vlal_dist.storage.s3_client import REASONS, process_counts
from vlal_dist.storage.store import Store
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.settings import RunSettings

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


METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"


def open_metrics(
    stack: ExitStack, settings: RunSettings, ranks: Ranks, *, store: Store, kernel: str
) -> TrainMetrics:
    """The metrics of this rank, served and announced if the settings say so.

    Args:
        stack: closes the endpoint. The announcement is removed first, unless an error ends the run:
            then it stays, so that the rank is missed.
        settings: address, and port of local rank 0; the others follow.
        ranks: this process among its peers.
        store: the run root.
        kernel: name of the backend that computes the selective loss.
    """
    disks = {"cache": settings.cache, "run": store.local_path(METRICS)}
    metrics = TrainMetrics(
        {
            "version": __version__,
            "torch": torch.__version__,
            "deepspeed": importlib.metadata.version("deepspeed"),
            "kernel": kernel,
        },
        read=lambda: storage_readings(disks),
    )
    stack.callback(metrics.close)
    if not settings.metrics:
        return metrics
    port = metrics.serve(host=settings.metrics_host, port=settings.metrics_port + ranks.local_rank)
    if port is not None and settings.targets is not None:
        target = Target(Path(settings.targets), run=store.url, role="train", rank=ranks.rank)
        target.write(host=settings.metrics_host, port=port)
        target.remove_others(world_size=ranks.world_size)

        def end(kind: type[BaseException] | None, *_: object) -> None:
            if kind is None or issubclass(kind, Stopped):
                target.remove()

        stack.push(end)
    return metrics


def storage_readings(disks: Mapping[str, Path | None]) -> dict[tuple[str, ...], float]:
    """Values of the metrics of `STORAGE`, now.

    Args:
        disks: value of label `mount` -> a path on it, which need not exist; None: not local.
    """
    counts = process_counts()
    readings: dict[tuple[str, ...], float] = {
        ("vlal_s3_requests_total",): counts.requests,
        ("vlal_s3_bytes_total", "in"): counts.bytes_in,
        ("vlal_s3_bytes_total", "out"): counts.bytes_out,
    }
    for reason in REASONS:
        readings["vlal_s3_retries_total", reason] = counts.repeated.get(reason, 0)
    for mount, path in disks.items():
        if path is None:
            continue
        path = path.absolute()
        with contextlib.suppress(OSError):  # a disk that is gone has no reading
            there = next(one for one in (path, *path.parents) if one.exists())
            readings["vlal_disk_free_bytes", mount] = shutil.disk_usage(there).free
    return readings


def record_start(store: Store, ranks: Ranks, *, step: int, kernel: str) -> None:
    """Add a line to `starts.jsonl`: with what, and on what, the run goes on from a step.

    A resumed run may have other hardware, so that every start has its line; a run that begins anew
    begins the file anew. Rank 0 writes, of its own machine; for the others nothing happens.

    Args:
        store: the run root.
        ranks: this process among its peers.
        step: optimizer steps done before.
        kernel: backend of the selective loss.
    """
    if ranks.rank != 0:
        return
    try:
        kept = lines_until(store.read(STARTS), step=step) if step else b""
    except NotFoundError:
        kept = b""
    on_gpu = ranks.device.type == "cuda"
    record = {
        "step": step,
        "version": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else _processor(),
        "ranks": ranks.world_size,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "kernel": kernel,
    }
    store.replace(STARTS, kept + (json.dumps(record) + "\n").encode())


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, `-dirty` if altered; None elsewhere."""
    root = Path(vlal_dist.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # a parent's repository would be somebody else's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    """The processor's name as Linux tells it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def open_log(
    stack: ExitStack,
    settings: RunSettings,
    ranks: Ranks,
    *,
    store: Store,
    metrics: TrainMetrics,
    step: int,
) -> MetricsLog | None:
    """`metrics.jsonl` of a run root, cut back to a step, and the trackers; on rank 0.

    Args:
        stack: closes the trackers.
        settings: which trackers.
        ranks: this process among its peers.
        store: the run root.
        metrics: told what the trackers drop.
        step: that the run starts from.
    """
    if ranks.rank != 0:
        return None
    trackers = open_trackers(stack, settings.trackers, store=store, step=step, metrics=metrics)
    try:
        kept = lines_until(store.read(METRICS), step=step) if step else b""
    except NotFoundError:
        kept = b""
    return MetricsLog(
        kept=kept,
        append_to=store.local_path(METRICS),
        replace=lambda data: store.replace(METRICS, data),
        also=trackers.log,
    )
