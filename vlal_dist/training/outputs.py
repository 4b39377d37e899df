"""What a run writes besides checkpoints: the metrics endpoint and log, and the best model."""

import importlib.metadata
from contextlib import ExitStack

import torch

from vlal_dist import __version__
from vlal_dist.errors import NotFoundError
from vlal_dist.evaluation.saved_model import SavedModelInfo, save_model
from vlal_dist.observability.metrics import MetricsLog, TrainMetrics, lines_until
from vlal_dist.storage.store import Store
from vlal_dist.training.settings import RunSettings
from vlal_dist.training.state import TrainState

BEST = "best"
METRICS = "metrics.jsonl"


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
