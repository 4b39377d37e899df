"""From settings to a finished run: open, resume, build, train. Each builder makes one part."""

import logging
from contextlib import ExitStack
from dataclasses import asdict

from vlal_dist.data.dataset import check_shard_sizes
from vlal_dist.data.loader import TrainLoader
from vlal_dist.kernels.backend import Chosen, choose
from vlal_dist.method.baselines import loss_settings
from vlal_dist.method.model import build_model, parameter_groups
from vlal_dist.storage.store import Store, open_store
from vlal_dist.training.account import Account
from vlal_dist.training.batches import make_batches, make_loader
from vlal_dist.training.best import BEST, BestModel
from vlal_dist.training.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from vlal_dist.training.engine import Engine
from vlal_dist.training.launcher import Launcher
from vlal_dist.training.objective import Objective, feasible_table
from vlal_dist.training.outputs import open_log, open_metrics, record_start
from vlal_dist.training.parts import Run
from vlal_dist.training.ranks import Ranks, join_ranks, peers_needed
from vlal_dist.training.resume import (
    agree_on,
    begin_anew,
    check_resume,
    restore,
    resume_kind,
)
from vlal_dist.training.run import train
from vlal_dist.training.schedule import Schedule
from vlal_dist.training.settings import RunSettings
from vlal_dist.training.sources import Sources, make_validation, open_sources, read_prior
from vlal_dist.training.state import Binding, TrainState
from vlal_dist.training.step import TrainStep
from vlal_dist.training.stop import StopRequest
from vlal_dist.training.tracking import check_trackers

logger = logging.getLogger(__name__)


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


def _begin(settings: RunSettings, sources: Sources, store: Store, resume: str) -> None:
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
    sources: Sources,
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
        account=Account(
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


def _bound(settings: RunSettings, sources: Sources, loader: TrainLoader | None = None) -> Binding:
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
    settings: RunSettings, sources: Sources, loader: TrainLoader, engine: Engine, ranks: Ranks
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


def _objective(settings: RunSettings, sources: Sources) -> Objective:
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
    settings: RunSettings, sources: Sources, loader: TrainLoader, ranks: Ranks
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


def _best_model(settings: RunSettings, sources: Sources, store: Store, engine: Engine) -> BestModel:
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
