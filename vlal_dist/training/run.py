"""The loop: epochs of steps, validation, schedule, checkpoints. Everything it uses is handed to it.

All ranks take the same path through it: whatever could differ (a signal, a sample that cannot be
read, a loss that is not finite, a save that failed) is agreed upon first.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import NoReturn

import torch

from vlal_dist.data.batch import decoded
from vlal_dist.data.loader import Step
from vlal_dist.errors import Stopped, StorageError, VlalError
from vlal_dist.training.parts import Run
from vlal_dist.training.publish import (
    epoch_label,
    epoch_progress,
    flush_log,
    publish_interval,
    publish_validation,
    save_and_publish,
    written,
)

logger = logging.getLogger(__name__)


def train(run: Run) -> None:
    """Train from `run.state` to the end, and leave the state there.

    A checkpoint that cannot be written in between is told and counted: training goes on.

    Raises:
        Stopped: a signal came; a checkpoint was written, the same command continues.
        DataError: a sample could not be read, or a loss was not finite; on every rank.
        StorageError: the last checkpoint could not be written; on every rank.
    """
    state = run.state
    (stopping,) = run.ranks.agree(run.stop.requested)
    if stopping:
        _leave(run)
    while state.epoch < run.settings.epochs and not _enough(run):
        finished = _train_epoch(run)
        if finished:
            run.account.check_epoch(run.loader, state.consumed)
        mean_ap = _validate(run)
        if finished:
            # A run cut by max_steps has not reached the end that the schedule waits for; an epoch
            # shorter than a batch (a small mix) has taught nothing.
            if state.consumed and run.schedule.observe(mean_ap):
                logger.info("plateau: rates cut to %s", run.schedule.rates_at(_done(run)))
            state.begin_epoch(state.epoch + 1)
        last = state.epoch >= run.settings.epochs or _enough(run)
        if last or state.epoch % run.settings.checkpoint_epochs == 0:
            kept = _save_state(run)
            if last and not kept:
                raise StorageError(
                    "trained to the end, but the last checkpoint was not written; make room or "
                    "bring the store back, then repeat the command: it goes on from the one before"
                )
    run.metrics.state("done")


def _train_epoch(run: Run) -> bool:
    """Steps to the end of the epoch (True) or to `max_steps` (False)."""
    run.metrics.state("training")
    run.engine.module.train()
    begin = run.state.consumed
    end = run.loader.end_of_epoch(run.state.epoch, begin)
    steps = run.loader.epoch(run.state.epoch, begin, run.account.quarantined)
    # Closing the generator cancels what it prepares ahead.
    with closing(steps), epoch_progress(run, left=end - begin) as progress:  # type: ignore[type-var]
        interval_started, interval_samples = time.monotonic(), 0
        for step, wait_s, started in _timed(run, steps):
            stopping = _one_step(run, step, wait_s, started)
            interval_samples += step.samples
            last = run.state.consumed >= end
            if run.state.step % run.settings.log_steps == 0 or last or stopping or _enough(run):
                seconds = max(time.monotonic() - interval_started, 1e-9)
                loss = publish_interval(run, samples_per_s=interval_samples / seconds)
                interval_started, interval_samples = time.monotonic(), 0
                if progress is not None:
                    progress.label = epoch_label(run, loss)
            if progress is not None:
                progress.advance(step.samples)
            if stopping:
                _leave(run)
            every = run.settings.checkpoint_steps
            if every and run.state.step % every == 0 and not last:
                _save_state(run)
                run.metrics.state("training")
            if _enough(run):
                return last
    return True


def _one_step(run: Run, step: Step, wait_s: float, started: float) -> bool:
    """Forward, backward, agree, apply, move the position on; returns whether a rank must stop."""
    state = run.state
    run.rates = run.schedule.rates_at(_done(run))
    run.engine.set_rates(run.rates)
    logged = (state.step + 1) % run.settings.log_steps == 0
    run.train_step.accumulate(step, sampled=logged)
    diverged, stopping, damaged = run.ranks.agree(
        not run.train_step.is_finite(), run.stop.requested, bool(step.damaged)
    )
    if diverged:
        run.metrics.state("failed")
        run.metrics.refused()
        run.train_step.refuse(state.step)
    run.train_step.apply()
    state.step += 1
    state.consumed = step.position
    run.account.enter(step)
    if damaged:
        run.account.quarantine(step.damaged)
    run.metrics.step(
        epoch=state.epoch,
        step=state.step,
        rows=sum(len(batch) for batch in step.micro_batches),
        wait_s=wait_s,
        duration_s=time.monotonic() - started,
    )
    return stopping


def _leave(run: Run) -> NoReturn:
    """Save and raise `Stopped`."""
    state = run.state
    run.metrics.state("stopping")
    if run.stop.received:
        run.metrics.stopped_by(run.stop.received)
    reason = run.stop.received or "what another rank received"
    kept = state.step == 0 or _save_state(run)
    stopped = (
        f"stopped by {reason} after step {state.step} (epoch {state.epoch}, "
        f"{state.consumed} samples in)"
    )
    if not kept:
        raise StorageError(
            f"{stopped}, but the checkpoint was not written; the same command resumes from the one "
            "before"
        )
    raise Stopped(f"{stopped}; the same command resumes")


def _validate(run: Run) -> float:
    """Score the validation split, keep the model if it is the best; returns mAP.

    A signal is obeyed before and in between, and a validation that fails leaves a checkpoint: the
    steps of the epoch are not lost, the same command validates again.
    """
    run.metrics.state("evaluating")
    state = run.state
    try:
        evaluation = run.validate(lambda: run.stop.requested)
    except VlalError:
        _save_state(run)
        raise
    if evaluation is None:
        _leave(run)
    found = evaluation.groups["overall"]["mAP"]
    if found is None:
        logger.warning(
            "no attribute of split %s has a positive and a negative: mAP counts as 0",
            run.settings.validation_split,
        )
    mean_ap = float(found or 0.0)
    better = state.best_map is None or mean_ap > state.best_map
    if better:
        state.best_map, state.best_step = mean_ap, state.step
        _on_rank_0(run, lambda: _write_best(run, found=True))
    publish_validation(run, evaluation, mean_ap=mean_ap, better=better)
    return mean_ap


def _save_state(run: Run) -> bool:
    """Write a checkpoint, if anything has changed since the last; returns whether there is one."""
    run.metrics.state("saving")
    flush_log(run)
    run.account.settle()
    run.state.schedule = run.schedule.state()
    now = asdict(run.state)
    if now == run.saved:
        return True
    optimizer = run.engine.optimizer_tensors(keep=run.ranks.rank == 0)
    if not _on_rank_0(run, lambda: save_and_publish(run, optimizer) and _write_best(run)):
        return False
    run.saved = now
    return True


def _write_best(run: Run, *, found: bool = False) -> bool:
    """Write the best model, if that is still to be done; returns whether it is done.

    Args:
        found: it is the present one.
    """
    if found:
        run.best.keep(run.state)
    return written(run, run.best.write, what="the best model")


def _on_rank_0(run: Run, write: Callable[[], bool]) -> bool:
    """Write on rank 0; every rank gets whether it could, or raises if it failed otherwise."""
    failed = run.ranks.together(lambda: run.ranks.rank == 0 and not write())
    (anywhere,) = run.ranks.agree(failed)
    return not anywhere


def _done(run: Run) -> float:
    """Share of the run that is done, by samples: it does not jump when a resume changes B."""
    state, settings = run.state, run.settings
    share = (
        state.epoch + state.consumed / max(1, run.loader.stream.length(state.epoch))
    ) / settings.epochs
    return max(share, state.step / settings.max_steps) if settings.max_steps else share


def _enough(run: Run) -> bool:
    return run.settings.max_steps is not None and run.state.step >= run.settings.max_steps


def _timed(run: Run, steps: Iterator[Step]) -> Iterator[tuple[Step, float, float]]:
    """Each step, the seconds that this rank itself waited for it, and when the waiting began.

    A rank that cannot read a sample tells the others before any of them enters the forward pass.
    """
    while True:
        started = time.monotonic()
        step, wait_s = run.ranks.together(lambda: _next(steps, run.ranks.device))
        if step is None:
            return
        yield step, wait_s, started


def _next(steps: Iterator[Step], device: torch.device) -> tuple[Step | None, float]:
    """The next step, and the seconds until it was here, without those for slower ranks.

    What the device decodes is decoded before anybody relies on this rank.
    """
    started = time.monotonic()
    step = next(steps, None)
    if step is not None:
        step.micro_batches = [decoded(batch, device) for batch in step.micro_batches]
    return step, time.monotonic() - started
