"""The loop: epochs of steps, validation, schedule, checkpoints. Everything it uses is handed to it.

All ranks take the same path through it: whatever could differ (a signal, a loss that is not
finite, a save that failed) is agreed upon first.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

from vlal_dist.data.loader import Step, TrainLoader
from vlal_dist.errors import Stopped, StorageError, VlalError
from vlal_dist.method.metrics import Evaluation
from vlal_dist.observability.metrics import TERM_KINDS, MetricsLog, TrainMetrics
from vlal_dist.observability.progress import Progress
from vlal_dist.training.engine import Engine
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.schedule import Schedule
from vlal_dist.training.settings import RunSettings
from vlal_dist.training.state import TrainState
from vlal_dist.training.step import TrainStep
from vlal_dist.training.stop import StopRequest

logger = logging.getLogger(__name__)

PARTS = {"base_decay": "backbone", "fast_decay": "head"}
"""Parameter groups whose rates are shown, and under which name."""


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
        validate: scores the validation split; called by all ranks, which get the same result.
        save_best: writes the best model; called on rank 0.
        save_state: writes a checkpoint; called on rank 0. None: this run writes none.
        metrics: what this rank exports.
        log: `metrics.jsonl`, on rank 0.
        stop: the signals.
        settings: numbers of epochs, steps and so on.
    """

    ranks: Ranks
    engine: Engine
    loader: TrainLoader
    train_step: TrainStep
    schedule: Schedule
    state: TrainState
    validate: Callable[[], Evaluation]
    save_best: Callable[[TrainState], None]
    save_state: Callable[[TrainState], object] | None
    metrics: TrainMetrics
    log: MetricsLog | None
    stop: StopRequest
    settings: RunSettings


def train(run: Run) -> None:
    """Train from `run.state` to the end, and leave the state there.

    Raises:
        Stopped: a signal came; a checkpoint was written, the same command continues.
        DataError: a loss was not finite.
        StorageError: a checkpoint or the best model could not be written.
    """
    state = run.state
    while state.epoch < run.settings.epochs and not _enough(run):
        finished = _train_epoch(run)
        mean_ap = _validate(run)
        if finished:
            # A run cut by max_steps has not reached the end that the schedule waits for.
            if run.schedule.observe(mean_ap):
                logger.info("plateau: rates cut to %s", run.schedule.rates_at(state.step))
            state.epoch, state.consumed = state.epoch + 1, 0
        if (
            state.epoch % run.settings.checkpoint_epochs == 0
            or state.epoch >= run.settings.epochs
            or _enough(run)
        ):
            _save_state(run)
    run.metrics.state("done")


def _train_epoch(run: Run) -> bool:
    """Steps to the end of the epoch (True) or to `max_steps` (False)."""
    run.metrics.state("training")
    run.engine.module.train()
    steps = run.loader.epoch(run.state.epoch, run.state.consumed)
    # Closing the generator cancels what it prepares ahead.
    with closing(steps), _progress(run) as progress:  # type: ignore[type-var]
        interval_started, interval_samples = time.monotonic(), 0
        for step, wait_s, started in _timed(steps):
            _one_step(run, step, wait_s, started)
            interval_samples += step.samples
            last = run.state.consumed >= run.loader.epoch_samples
            if run.state.step % run.settings.log_steps == 0 or last or _enough(run):
                seconds = max(time.monotonic() - interval_started, 1e-9)
                loss = _log_interval(run, samples_per_s=interval_samples / seconds)
                interval_started, interval_samples = time.monotonic(), 0
                if progress is not None:
                    progress.label = _label(run, loss)
            if progress is not None:
                progress.advance(step.samples)
            if _enough(run):
                return last
    return True


def _one_step(run: Run, step: Step, wait_s: float, started: float) -> None:
    """Forward, backward, agree, apply, move the position on; save and leave when asked to."""
    state = run.state
    run.engine.set_rates(run.schedule.rates_at(state.step))
    run.train_step.accumulate(step)
    diverged, stopping = run.ranks.agree(not run.train_step.is_finite(), run.stop.requested)
    if diverged:
        run.metrics.state("failed")
        run.train_step.refuse(state.step)
    run.train_step.apply()
    state.step += 1
    state.consumed = step.position
    run.metrics.step(
        epoch=state.epoch,
        step=state.step,
        rows=sum(len(batch) for batch in step.micro_batches),
        wait_s=wait_s,
        duration_s=time.monotonic() - started,
    )
    if stopping:
        _leave(run)


def _leave(run: Run) -> None:
    """Save and raise `Stopped`."""
    run.metrics.state("stopping")
    reason = run.stop.received or "a signal to another rank"
    if run.save_state is None:
        raise VlalError(
            f"stopped by {reason} after step {run.state.step}; with training.zero_stage above 0 "
            "nothing is saved: the same command starts anew"
        )
    _save_state(run)
    raise Stopped(
        f"stopped by {reason} after step {run.state.step} (epoch {run.state.epoch}, "
        f"{run.state.consumed} samples in); the same command resumes"
    )


def _log_interval(run: Run, *, samples_per_s: float) -> float:
    """Reduce and publish what happened since the last time; returns the mean loss of a row."""
    own = run.train_step.take_tally()
    means = own.over_ranks(run.ranks).per_row()
    rates = run.schedule.rates_at(run.state.step - 1)
    shown = {PARTS[name]: rate for name, rate in rates.items() if name in PARTS}
    run.metrics.interval(
        loss={
            name.removeprefix("loss_").replace("loss", "total"): value
            for name, value in means.items()
            if name.startswith("loss")
        },
        rates=shown,
        term_counts=dict(zip(TERM_KINDS, (int(n) for n in own.pairs.tolist()), strict=True)),
    )
    if run.log is not None:
        run.log.write(
            {
                "kind": "train",
                "epoch": run.state.epoch,
                "step": run.state.step,
                **means,
                "samples_per_s": samples_per_s,
                "lr": shown,
            }
        )
    return means["loss"]


def _validate(run: Run) -> float:
    """Score the validation split, keep the model if it is the best; returns mAP."""
    run.metrics.state("evaluating")
    state = run.state
    groups = run.validate().groups
    overall = groups["overall"]
    if overall["mAP"] is None:
        logger.warning(
            "no attribute of split %s has a positive and a negative: mAP counts as 0",
            run.settings.validation_split,
        )
    mean_ap = float(overall["mAP"] or 0.0)
    by_group = {name: float(g["mAP"]) for name, g in groups.items() if g["mAP"] is not None}
    run.metrics.validation(split=run.settings.validation_split, mean_ap=by_group)
    better = state.best_map is None or mean_ap > state.best_map
    if better:
        state.best_map, state.best_step = mean_ap, state.step
        _on_rank_0(run, lambda: run.save_best(state))
    if run.log is not None:
        record = {"kind": "validation", "epoch": state.epoch, "step": state.step}
        run.log.write({**record, **overall, "mAP": mean_ap, "groups": by_group, "best": better})
        run.log.flush()
    logger.info(
        "epoch %d, step %d: mAP %.4f on %s over %s attributes%s",
        state.epoch + 1,
        state.step,
        mean_ap,
        run.settings.validation_split,
        overall["num_classes"],
        ", the best so far" if better else f", best {state.best_map:.4f}",
    )
    return mean_ap


def _save_state(run: Run) -> None:
    save = run.save_state
    if save is None:
        return
    run.metrics.state("saving")
    run.state.schedule = run.schedule.state()
    _on_rank_0(run, lambda: save(run.state))


def _on_rank_0(run: Run, write: Callable[[], object]) -> None:
    """Write on rank 0; if that fails, every rank raises."""
    failure: VlalError | None = None
    if run.ranks.rank == 0:
        try:
            write()
        except VlalError as error:
            failure = error
    (failed,) = run.ranks.agree(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise StorageError("rank 0 could not write to the run root; its own message says why")


def _enough(run: Run) -> bool:
    return run.settings.max_steps is not None and run.state.step >= run.settings.max_steps


def _timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float, float]]:
    """Each step, the seconds that were waited for it, and when the waiting began."""
    while True:
        started = time.monotonic()
        step = next(steps, None)
        if step is None:
            return
        yield step, time.monotonic() - started, started


def _progress(run: Run) -> AbstractContextManager[Progress | None]:
    """The bar of an epoch, on rank 0."""
    if run.ranks.rank != 0:
        return nullcontext()
    left = run.loader.epoch_samples - run.state.consumed
    return Progress(_label(run, None), total=left, unit="samples")


def _label(run: Run, loss: float | None) -> str:
    shown = "" if loss is None else f", loss {loss:.4g}"
    return f"epoch {run.state.epoch + 1}/{run.settings.epochs}{shown}"
