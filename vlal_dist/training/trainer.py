"""Build a training run from its settings, and train: epochs, validation, checkpoints.

All ranks take the same path through it: whatever could differ (a signal, a sample that cannot be
read, a loss that is not finite, a save that failed) is agreed upon first.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import NoReturn

import torch

from vlal_dist.data.format.dataset import check_shard_sizes
from vlal_dist.data.loading.batch import decoded
from vlal_dist.data.loading.loader import Step, TrainLoader
from vlal_dist.errors import Stopped, StorageError, VlalError
from vlal_dist.kernels.backend import Chosen, choose
from vlal_dist.method.baselines import loss_settings
from vlal_dist.method.model import build_model, parameter_groups
from vlal_dist.storage.store import Store, open_store
from vlal_dist.training.best_model import BEST, BestModel
from vlal_dist.training.checkpoint import (
    Binding,
    Checkpoint,
    TrainState,
    find_checkpoint,
    save_checkpoint,
)
from vlal_dist.training.data import (
    RunData,
    make_batches,
    make_loader,
    make_validation,
    open_sources,
    read_prior,
)
from vlal_dist.training.engine import Engine
from vlal_dist.training.epoch_check import EpochCheck
from vlal_dist.training.objective import Objective, feasible_table
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
from vlal_dist.training.ranks import Ranks, join_ranks, peers_needed
from vlal_dist.training.resume import (
    agree_on,
    begin_anew,
    check_resume,
    restore,
    resume_kind,
)
from vlal_dist.training.run_log import check_trackers, open_log, open_metrics, record_start
from vlal_dist.training.schedule import Schedule
from vlal_dist.training.settings import RunSettings
from vlal_dist.training.step import TrainStep
from vlal_dist.training.stop import Launcher, StopRequest

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


def run_training(
    settings: RunSettings, *, resume: str, launcher: Launcher
) -> tuple[TrainState, int]:
    """Do a run, or what is left of it.

    Args:
        settings: all knobs.
        resume: `auto`, `none`, or the path or URL of a checkpoint or of a run root.
        launcher: whose end ends the run, after a save.

    Returns:
        Where the run stands at its end, and the number of ranks.

    Raises:
        ConfigError, DataError, StorageError, Stopped: see errors.py; on every rank.
    """
    sources = open_sources(
        settings.dataset_url,
        mix=settings.mix,
        subset=settings.subset,
        repeat_threshold=settings.repeat_threshold,
        scores_url=settings.scores_url,
        temperature=settings.temperature,
        cache=settings.cache,
        train_split=settings.train_split,
        validation_split=settings.validation_split,
        weighted_by=settings.weighted_by,
    )
    store = open_store(settings.run_url)
    found = find_checkpoint(store, resume)
    check_resume(found, _bound(settings, sources))
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(launcher))
        ranks = join_ranks(threads=settings.torch_threads, timeout_s=settings.peer_timeout_s)
        agree_on(found, ranks)
        ranks.together(
            lambda: _begin(settings, sources, store, resume) if ranks.rank == 0 else None
        )
        how = resume_kind(found, world_size=ranks.world_size)
        with peers_needed():
            run = _build(settings, sources, found, ranks, stop, store, stack)
            run.metrics.resumed(how)
            train(run)
    return run.state, ranks.world_size


def _begin(settings: RunSettings, sources: RunData, store: Store, resume: str) -> None:
    """What rank 0 does before the first step: look at the shards, prepare the run root."""
    check_trackers(settings.trackers)
    for split in sources.corpus.splits:
        check_shard_sizes(split, may_be_damaged=settings.damage == "quarantine")
    check_shard_sizes(sources.validation)
    if resume == "none":
        begin_anew(store)
    store.sweep(BEST)
    store.replace("config.yaml", settings.config_text.encode())


def _build(
    settings: RunSettings,
    sources: RunData,
    found: Checkpoint | None,
    ranks: Ranks,
    stop: StopRequest,
    store: Store,
    stack: ExitStack,
) -> Run:
    """Everything that `train` uses; what must be closed is left on the stack."""
    backend = ranks.together(lambda: _backend(settings, ranks))
    logger.info("selective loss by backend %s: %s", *backend)
    metrics = open_metrics(stack, settings, ranks, store=store, kernel=backend.name)
    loader = ranks.together(lambda: make_loader(settings, sources, found, ranks))
    stack.callback(loader.close)
    schedule, engine = _schedule_and_engine(settings, sources, loader, ranks)
    state = restore(
        found,
        engine=engine,
        schedule=schedule,
        binding=_bound(settings, sources, loader),
        batch=_batch(settings, ranks),
        store=store,
    )
    ranks.together(lambda: record_start(store, ranks, step=state.step, kernel=backend.name))
    validation = ranks.together(lambda: make_batches(settings, sources, ranks, train=False))
    stack.callback(validation.close)
    return Run(
        ranks=ranks,
        engine=engine,
        loader=loader,
        train_step=ranks.together(lambda: _train_step(settings, sources, loader, engine, ranks)),
        schedule=schedule,
        state=state,
        account=EpochCheck(
            ranks,
            state,
            num_samples=sources.num_samples,
            max_quarantined=settings.max_quarantined,
        ),
        validate=make_validation(
            validation,
            model=engine.module,
            ranks=ranks,
            groups=sources.dataset.vocabulary.groups(),
            batch_size=settings.evaluation_batch_size,
            top_k=settings.top_k,
            threshold=settings.threshold,
        ),
        best=_best_model(settings, sources, store, engine),
        save_state=lambda now, optimizer: save_checkpoint(
            store, now, engine.module.state_dict(), optimizer, keep=settings.keep_checkpoints
        ),
        metrics=metrics,
        log=open_log(stack, settings, ranks, store=store, metrics=metrics, step=state.step),
        stop=stop,
        settings=settings,
        saved=asdict(state) if found and found.where.startswith(f"{store.url}/") else {},
    )


def _bound(settings: RunSettings, sources: RunData, loader: TrainLoader | None = None) -> Binding:
    """What the run is bound to; lanes and micro-batches are 0 until the loader chose them."""
    return Binding(
        dataset_digest=sources.dataset.digest,
        vocabulary_digest=sources.dataset.vocabulary.digest,
        feasible_digest=sources.dataset.feasible.digest,
        train_split=settings.train_split,
        seed=settings.seed,
        lanes=loader.lanes if loader else settings.lanes,
        micro_batches=loader.micro_batches if loader else 0,
        window_blocks=settings.window_blocks,
        epoch_end=settings.epoch_end,
        mix=sources.mix,
        subset=sources.subset,
        repeat_threshold=settings.repeat_threshold,
    )


def _batch(settings: RunSettings, ranks: Ranks) -> dict[str, int]:
    """How a step is made up; may change at a resume."""
    return {
        "batch_size": settings.batch_size,
        "accumulation": settings.accumulation,
        "reference_batch": settings.reference_batch,
        "world_size": ranks.world_size,
    }


def _backend(settings: RunSettings, ranks: Ranks) -> Chosen:
    """What computes the selective loss on this rank, and why."""
    if settings.kernel == "reference":
        return Chosen("reference", "training.kernel says so")
    return choose(ranks.device.type)


def _train_step(
    settings: RunSettings, sources: RunData, loader: TrainLoader, engine: Engine, ranks: Ranks
) -> TrainStep:
    vocabulary = sources.dataset.vocabulary
    return TrainStep(
        engine,
        ranks,
        objective=_objective(settings, sources),
        feasible=feasible_table(
            sources.dataset.feasible,
            num_objects=len(vocabulary.objects),
            num_attributes=len(vocabulary.attributes),
            device=ranks.device,
        ),
        micro_batches=loader.micro_batches_per_step,
    )


def _objective(settings: RunSettings, sources: RunData) -> Objective:
    """Sec. 2.3, or a row of Table 1."""
    prior = None
    if settings.loss == "psl" and settings.psl_prior is not None:
        prior = read_prior(settings.psl_prior, sources.dataset.vocabulary.attributes)
    positive, negative, feasible, infeasible = settings.gammas
    return Objective(
        loss=loss_settings(
            settings.loss,
            gamma_positive=positive,
            gamma_negative=negative,
            gamma_feasible=feasible,
            gamma_infeasible=infeasible,
        ),
        margin=settings.margin,
        detach_focal=settings.detach_focal,
        num_ignore=settings.num_ignore,
        draw_over=settings.draw_over,
        draw=settings.draw,
        seed=settings.seed,
        kernel=settings.kernel,
        batch_size=settings.batch_size,
        reference_batch=settings.reference_batch,
        psl_prior=prior,
        psl_threshold=settings.psl_threshold,
        psl_top_k=settings.psl_topk,
    )


def _schedule_and_engine(
    settings: RunSettings, sources: RunData, loader: TrainLoader, ranks: Ranks
) -> tuple[Schedule, Engine]:
    vocabulary = sources.dataset.vocabulary
    model = build_model(
        depth=settings.depth,
        width=settings.width,
        num_objects=len(vocabulary.objects),
        num_attributes=len(vocabulary.attributes),
        object_gate=settings.object_gate,
        weights=settings.weights,
        seed=settings.seed,
    )
    groups = parameter_groups(
        model,
        lr_new=settings.lr_new,
        lr_pretrained=settings.lr_pretrained,
        weight_decay=settings.weight_decay,
        pretrained=settings.weights is not None,
    )
    schedule = Schedule(
        settings.schedule,
        rates={group["name"]: group["lr"] for group in groups},
        factor=settings.plateau_factor,
        patience=settings.plateau_patience,
    )
    on_gpu = ranks.device.type == "cuda"
    engine = Engine(
        model,
        groups=groups,
        ranks=ranks,
        batch_size=settings.batch_size,
        micro_batches=loader.micro_batches_per_step,
        zero_stage=settings.zero_stage,
        bf16=settings.precision == "bf16" or (settings.precision == "auto" and on_gpu),
    )
    return schedule, engine


def _best_model(settings: RunSettings, sources: RunData, store: Store, engine: Engine) -> BestModel:
    return BestModel(
        store,
        engine.module,
        depth=settings.depth,
        width=settings.width,
        object_gate=settings.object_gate,
        num_objects=len(sources.dataset.vocabulary.objects),
        num_attributes=len(sources.dataset.vocabulary.attributes),
        image_size=settings.image_size,
        normalize=settings.normalize,
        profile=settings.profile,
        loss=settings.loss,
    )
