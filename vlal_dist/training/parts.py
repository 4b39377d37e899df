"""What a built run consists of: everything that the loop uses is handed to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlal_dist.data.loading.loader import TrainLoader
from vlal_dist.method.metrics import Evaluation
from vlal_dist.observability.metrics import TrainMetrics
from vlal_dist.observability.metrics_log import MetricsLog
from vlal_dist.training.best_model import BestModel
from vlal_dist.training.checkpoint import TrainState
from vlal_dist.training.engine import Engine
from vlal_dist.training.epoch_check import EpochCheck
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.schedule import Schedule
from vlal_dist.training.settings import RunSettings
from vlal_dist.training.step import TrainStep
from vlal_dist.training.stop import StopRequest


@dataclass
class Run:
    """A built run.

    Attributes:
        ranks: this process among its peers.
        engine: model and optimizer.
        loader: the training stream.
        train_step: runs a step.
        schedule: learning rates.
        state: where the run stands; moved on by `train`.
        account: what the ledger and the quarantine hold of it.
        validate: scores the validation split; called by all ranks, which get the same result: None
            if what it is given, asked before each batch, says on any rank that it is to stop.
        best: keeps and writes the best model; used on rank 0.
        save_state: writes a checkpoint with Adam's state, returns its bytes; called on rank 0.
        saved: the state in the newest checkpoint.
        metrics: what this rank exports.
        log: `metrics.jsonl`, on rank 0.
        stop: the signals.
        settings: numbers of epochs, steps and so on.
        rates: learning rate of each parameter group at the last step.
    """

    ranks: Ranks
    engine: Engine
    loader: TrainLoader
    train_step: TrainStep
    schedule: Schedule
    state: TrainState
    account: EpochCheck
    validate: Callable[[Callable[[], bool]], Evaluation | None]
    best: BestModel
    save_state: Callable[[TrainState, Mapping[str, Tensor]], int]
    metrics: TrainMetrics
    log: MetricsLog | None
    stop: StopRequest
    settings: RunSettings
    saved: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
