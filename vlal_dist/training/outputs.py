"""What a run writes besides checkpoints: metrics, its log, what it ran on, and the best model."""

import importlib.metadata
import json
import os
import platform
import subprocess
from contextlib import ExitStack
from pathlib import Path

import torch

import vlal_dist
from vlal_dist import __version__
from vlal_dist.errors import NotFoundError
from vlal_dist.evaluation.saved_model import SavedModelInfo, save_model
from vlal_dist.observability.metrics import MetricsLog, TrainMetrics, lines_until
from vlal_dist.storage.store import Store
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.settings import RunSettings
from vlal_dist.training.state import TrainState

BEST = "best"
METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"


def open_metrics(
    stack: ExitStack, settings: RunSettings, *, local_rank: int, kernel: str
) -> TrainMetrics:
    """The metrics of this rank, served if the settings say so; closed by the stack.

    Args:
        stack: closes the endpoint.
        settings: address, and port of local rank 0; the others follow.
        local_rank: place among the processes of this machine.
        kernel: name of the backend that computes the selective loss.
    """
    metrics = TrainMetrics(
        {
            "version": __version__,
            "torch": torch.__version__,
            "deepspeed": importlib.metadata.version("deepspeed"),
            "kernel": kernel,
        }
    )
    if settings.metrics:
        metrics.serve(host=settings.metrics_host, port=settings.metrics_port + local_rank)
    stack.callback(metrics.close)
    return metrics


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


def open_log(store: Store, *, step: int) -> MetricsLog:
    """`metrics.jsonl` of a run root, cut back to the step that the run starts from."""
    try:
        kept = lines_until(store.read(METRICS), step=step) if step else b""
    except NotFoundError:
        kept = b""
    return MetricsLog(
        kept=kept,
        append_to=store.local_path(METRICS),
        replace=lambda data: store.replace(METRICS, data),
    )


def save_best(store: Store, model: torch.nn.Module, state: TrainState, **settings: object) -> None:
    """Write the best model, for evaluate and predict.

    Args:
        store: the run root.
        model: the model as it is now.
        state: where the run stands.
        settings: the remaining fields of `SavedModelInfo`.
    """
    info = SavedModelInfo(
        **settings,  # type: ignore[arg-type]
        vocabulary_digest=state.binding.vocabulary_digest,
        feasible_digest=state.binding.feasible_digest,
        seed=state.binding.seed,
        step=state.step,
        epoch=state.epoch + 1,
        validation_map=state.best_map or 0.0,
    )
    save_model(store, BEST, model, info)
