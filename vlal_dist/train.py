"""`deepspeed vlal_dist/train.py`: train f_a(x, o) with the selective loss, or a row of Table 1.

Starts as well under torchrun and plain python. Heavy imports happen inside functions: `--help` and
a wrong flag answer at once.
"""

import sys
from pathlib import Path

# Started by path, Python puts this file's folder first, where `evaluate`, `data` or `kernels` would
# shadow other packages; the repository root belongs there.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vlal_dist.config.config import Config
from vlal_dist.config.load import config_yaml
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.storage.store import Store, open_store
from vlal_dist.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vlal_dist.data.batches import BatchMaker
    from vlal_dist.data.loader import TrainLoader
    from vlal_dist.training.checkpoint import Checkpoint
    from vlal_dist.training.engine import Engine
    from vlal_dist.training.objective import Objective
    from vlal_dist.training.ranks import Ranks
    from vlal_dist.training.run import Run
    from vlal_dist.training.schedule import Schedule
    from vlal_dist.training.sources import Sources
    from vlal_dist.training.state import TrainState
    from vlal_dist.training.stop import StopRequest

logger = logging.getLogger("vlal_dist.train")

PURPOSE = """
Train on a merged dataset (paths.merged), or on a packed one with score files (data.likelihood
scores), validate after every epoch, and write checkpoints, metrics.jsonl and the best model to
paths.run. Repeating the command resumes from the newest whole checkpoint, on any number of ranks.
"""


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Open, build, train; returns the closing counts."""
    from vlal_dist.training.checkpoint import find_checkpoint
    from vlal_dist.training.ranks import join_ranks
    from vlal_dist.training.resume import agree_on, begin_anew, check_resume
    from vlal_dist.training.run import train
    from vlal_dist.training.stop import StopRequest

    resume = flags.get("resume", "auto")
    sources = _sources(config)
    store = open_store(config.paths.run)
    found = find_checkpoint(store, resume)
    check_resume(found, _bound(config, sources), zero_stage=config.training.zero_stage)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        ranks = join_ranks(threads=config.training.threads)
        agree_on(found, ranks)
        if ranks.rank == 0 and resume == "none":
            begin_anew(store)
        run = _build(config, sources, found, ranks, stop, store, stack)
        if ranks.rank == 0:
            store.replace("config.yaml", config_yaml(config).encode())
        train(run)
    state = run.state
    return {
        "epochs": state.epoch,
        "steps": state.step,
        "ranks": ranks.world_size,
        "best_mAP": "none" if state.best_map is None else state.best_map,
        "best_step": "none" if state.best_step is None else state.best_step,
        "model": f"{config.paths.run}/best",
    }


def _objective(config: Config, vocabulary: Vocabulary) -> "Objective":
    """Sec. 2.3, or a row of Table 1."""
    from vlal_dist.method.baselines import loss_settings
    from vlal_dist.training.objective import Objective
    from vlal_dist.training.sources import read_prior

    method = config.method
    prior = method.psl_prior if method.loss == "psl" else None
    return Objective(
        loss=loss_settings(
            method.loss,
            gamma_positive=method.gamma_positive,
            gamma_negative=method.gamma_negative,
            gamma_feasible=method.gamma_feasible,
            gamma_infeasible=method.gamma_infeasible,
        ),
        margin=method.margin,
        detach_focal=method.detach_focal,
        num_ignore=None if method.num_ignore == "all" else method.num_ignore,
        draw_over=method.draw_over,
        seed=config.training.seed,
        batch_size=config.training.batch_size,
        reference_batch=config.training.reference_batch,
        psl_prior=None if prior is None else read_prior(prior, vocabulary),
        psl_threshold=method.psl_threshold,
        psl_top_k=method.psl_topk,
    )


def _sources(config: Config) -> "Sources":
    from vlal_dist.training.sources import open_sources

    in_tars = config.data.likelihood == "tar"
    return open_sources(
        config.paths.merged if in_tars else config.paths.dataset,
        scores_url=None if in_tars else config.paths.scores,
        temperature=config.scoring.temperature,
        cache=Path(config.paths.cache),
        train_split=config.data.train_split,
        validation_split=config.data.validation_split,
        # None or all of a set is ignored without looking at likelihoods.
        needs_likelihood=config.method.loss == "selective"
        and config.method.num_ignore not in (0, "all"),
    )


def _bound(config: Config, sources: "Sources") -> dict[str, object]:
    """What a run is bound to, as far as the configuration says it; see `state.Binding`."""
    bound: dict[str, object] = {
        "dataset_digest": sources.dataset.digest,
        "vocabulary_digest": sources.dataset.vocabulary.digest,
        "feasible_digest": sources.dataset.feasible.digest,
        "train_split": config.data.train_split,
        "seed": config.training.seed,
        "window_blocks": config.data.window_blocks,
        "epoch_end": config.data.epoch_end,
    }
    if config.data.lanes:
        bound["lanes"] = config.data.lanes
    return bound


def _build(
    config: Config,
    sources: "Sources",
    found: "Checkpoint | None",
    ranks: "Ranks",
    stop: "StopRequest",
    store: Store,
    stack: ExitStack,
) -> "Run":
    """Everything that `train` uses; what must be closed is left on the stack."""
    from vlal_dist.training.outputs import open_log, open_metrics
    from vlal_dist.training.run import Run
    from vlal_dist.training.sources import make_validation
    from vlal_dist.training.step import TrainStep

    vocabulary, settings, watched = (
        sources.dataset.vocabulary,
        config.training,
        config.observability,
    )
    metrics = open_metrics(
        stack,
        serve=watched.metrics,
        host=watched.metrics_host,
        port=watched.metrics_port,
        local_rank=ranks.local_rank,
    )
    objective = _objective(config, vocabulary)
    loader = _loader(config, sources, found, ranks)
    stack.callback(loader.close)
    engine, schedule = _engine_and_schedule(config, sources, loader, ranks)
    state = _restore(config, sources, found, loader, engine, schedule, store, ranks)
    validation = _batch_maker(config, sources, train=False)
    stack.callback(validation.close)
    return Run(
        ranks=ranks,
        engine=engine,
        loader=loader,
        train_step=TrainStep(
            engine, ranks, objective=objective, micro_batches=loader.micro_batches_per_step
        ),
        schedule=schedule,
        state=state,
        validate=make_validation(
            validation,
            model=engine.module,
            ranks=ranks,
            vocabulary=vocabulary,
            batch_size=config.evaluation.batch_size,
            top_k=config.evaluation.top_k,
            threshold=config.evaluation.threshold,
        ),
        save_best=_save_best(config, vocabulary, store, engine),
        save_state=_save_state(config, store, engine),
        metrics=metrics,
        log=open_log(store, step=state.step) if ranks.rank == 0 else None,
        stop=stop,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        log_steps=settings.log_steps,
        checkpoint_epochs=settings.checkpoint_epochs,
        validation_split=config.data.validation_split,
    )


def _batch_maker(config: Config, sources: "Sources", *, train: bool) -> "BatchMaker":
    from vlal_dist.data.batches import BatchMaker

    return BatchMaker(
        sources.train if train else sources.validation,
        feasible=sources.dataset.feasible,
        num_attributes=len(sources.dataset.vocabulary.attributes),
        image_size=config.data.image_size,
        normalize=config.data.normalize,
        threads=config.data.threads,
        read_likelihood=sources.read_likelihood if train else None,
    )


def _loader(
    config: Config, sources: "Sources", found: "Checkpoint | None", ranks: "Ranks"
) -> "TrainLoader":
    from vlal_dist.data.loader import TrainLoader

    binding = found.state.binding if found else None
    loader = TrainLoader(
        _batch_maker(config, sources, train=True),
        batch_size=config.training.batch_size,
        accumulation=config.training.accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.training.seed,
        lanes=binding.lanes if binding else config.data.lanes,
        micro_batches=binding.micro_batches if binding else 0,
        window_blocks=config.data.window_blocks,
        epoch_end=config.data.epoch_end,
        flip=config.data.flip,
        prefetch_steps=config.data.prefetch_steps,
    )
    if loader.micro_batches % ranks.world_size:
        logger.info(
            "%d micro-batches of a step are recut for %d ranks: BatchNorm sees other groups",
            loader.micro_batches,
            ranks.world_size,
        )
    return loader


def _engine_and_schedule(
    config: Config, sources: "Sources", loader: "TrainLoader", ranks: "Ranks"
) -> "tuple[Engine, Schedule]":
    from vlal_dist.method.model import build_model, parameter_groups
    from vlal_dist.training.engine import Engine
    from vlal_dist.training.schedule import Schedule

    vocabulary, settings = sources.dataset.vocabulary, config.training
    model = build_model(
        depth=config.model.depth,
        num_objects=len(vocabulary.objects),
        num_attributes=len(vocabulary.attributes),
        object_gate=config.model.object_gate,
        weights=config.model.weights,
        seed=settings.seed,
    )
    groups = parameter_groups(
        model,
        lr_new=settings.lr_new,
        lr_pretrained=settings.lr_pretrained,
        weight_decay=settings.weight_decay,
        pretrained=config.model.weights is not None,
    )
    on_gpu = ranks.device.type == "cuda"
    total_steps = settings.epochs * loader.steps_per_epoch
    schedule = Schedule(
        settings.schedule,
        rates={group["name"]: group["lr"] for group in groups},
        total_steps=min(total_steps, settings.max_steps or total_steps),
        factor=settings.plateau_factor,
        patience=settings.plateau_patience,
    )
    engine = Engine(
        model,
        groups=groups,
        ranks=ranks,
        batch_size=settings.batch_size,
        micro_batches=loader.micro_batches_per_step,
        zero_stage=settings.zero_stage,
        bf16=settings.precision == "bf16" or (settings.precision == "auto" and on_gpu),
    )
    return engine, schedule


def _restore(
    config: Config,
    sources: "Sources",
    found: "Checkpoint | None",
    loader: "TrainLoader",
    engine: "Engine",
    schedule: "Schedule",
    store: Store,
    ranks: "Ranks",
) -> "TrainState":
    from vlal_dist.training.resume import restore
    from vlal_dist.training.state import Binding

    bound = {**_bound(config, sources), "lanes": loader.lanes}
    return restore(
        found,
        engine=engine,
        schedule=schedule,
        binding=Binding(**bound, micro_batches=loader.micro_batches),
        batch={
            "batch_size": config.training.batch_size,
            "accumulation": config.training.accumulation,
            "reference_batch": config.training.reference_batch,
            "world_size": ranks.world_size,
        },
        has_best=store.exists("best/model.json"),
    )


def _save_best(
    config: Config, vocabulary: Vocabulary, store: Store, engine: "Engine"
) -> "Callable[[TrainState], None]":
    from vlal_dist.training.outputs import save_best

    return lambda state: save_best(
        store,
        engine.module,
        state,
        depth=config.model.depth,
        object_gate=config.model.object_gate,
        num_objects=len(vocabulary.objects),
        num_attributes=len(vocabulary.attributes),
        image_size=config.data.image_size,
        normalize=config.data.normalize,
        profile=config.method.profile,
        loss=config.method.loss,
    )


def _save_state(
    config: Config, store: Store, engine: "Engine"
) -> "Callable[[TrainState], None] | None":
    from vlal_dist.training.checkpoint import save_checkpoint

    if config.training.zero_stage > 0:
        return None

    def save(state: "TrainState") -> None:
        save_checkpoint(
            store,
            state,
            model=engine.module,
            optimizer=engine.optimizer,
            keep=config.training.keep_checkpoints,
        )

    return save


PROGRAM = Program(
    name="train",
    usage="deepspeed vlal_dist/train.py (or python, or torchrun)",
    purpose=PURPOSE,
    sections=("paths", "data", "method", "model", "training", "evaluation", "observability"),
    flags=("resume", "json"),
    output=lambda config: config.paths.run,
    work=work,
)


def main() -> int:
    """Run the program on the command line's arguments; every rank exits with the same code."""
    code = 1
    try:
        code = run_program(PROGRAM, sys.argv[1:], quiet=os.environ.get("RANK", "0") != "0")
    except Exception:
        logger.exception("train: failed")
    # Only here, where no frame of the run holds the engine any more; see leave_ranks.
    if engine := sys.modules.get("vlal_dist.training.engine"):
        engine.leave_ranks()
    return code


if __name__ == "__main__":
    sys.exit(main())
