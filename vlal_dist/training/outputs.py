"""What a run writes besides checkpoints and models: metrics, its log, what it ran on."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

import vlal_dist
from vlal_dist import __version__
from vlal_dist.errors import NotFoundError, Stopped
from vlal_dist.observability.metrics import TrainMetrics
from vlal_dist.observability.metrics_log import MetricsLog, lines_until
from vlal_dist.observability.targets import Target
from vlal_dist.storage.s3_counts import REASONS, process_counts
from vlal_dist.storage.store import Store
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.settings import RunSettings
from vlal_dist.training.tracking import open_trackers

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
