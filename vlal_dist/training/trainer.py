"""Training: epochs, steps, validation, checkpoints.

All ranks take the same path: whatever may differ between them (a signal, a sample that cannot be
read, a loss that is not finite, a save that failed) is agreed upon before any of them acts on it.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from vlal_dist.config.sections import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    ObservabilityConfig,
    PathsConfig,
    ScoringConfig,
    TrainingConfig,
)
from vlal_dist.data.format.dataset import check_shard_sizes
from vlal_dist.data.loading.batch import decoded
from vlal_dist.data.loading.loader import Step
from vlal_dist.errors import ConflictError, DataError, Stopped, StorageError, VlalError
from vlal_dist.evaluation.results import TRAINED_ON
from vlal_dist.kernels.backend import Chosen, choose
from vlal_dist.method.model import build_model, parameter_groups
from vlal_dist.processes import handled
from vlal_dist.release.saved_model import SavedModelInfo
from vlal_dist.remarks import remark
from vlal_dist.storage.store import Store, open_store
from vlal_dist.training.checkpoint import (
    Binding,
    Checkpoint,
    TrainState,
    complete_checkpoints,
    discard,
    find_checkpoint,
    load_weights,
    save_checkpoint,
)
from vlal_dist.training.data import open_data, read_prior
from vlal_dist.training.engine import Engine
from vlal_dist.training.epoch_check import EpochCheck
from vlal_dist.training.objective import feasible_table
from vlal_dist.training.ranks import join_ranks, peers_needed
from vlal_dist.training.run_log import (
    RunLog,
    check_trackers,
    failure_reason,
    open_metrics,
    record_start,
)
from vlal_dist.training.schedule import Schedule
from vlal_dist.training.step import TrainStep
from vlal_dist.training.stop import SIGNALS, Launcher, StopRequest
from vlal_dist.training.validation import BEST, BestModel, Validator, holds_best

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunConfig:
    """The sections of the configuration that a training run reads.

    Attributes:
        loss: section `method`.
        text: the whole configuration as YAML, written to the run root.
        shared: settings that must be equal on all ranks (`pipeline.shared_settings`).
    """

    paths: PathsConfig
    data: DataConfig
    loss: LossConfig
    model: ModelConfig
    training: TrainingConfig
    scoring: ScoringConfig
    evaluation: EvaluationConfig
    observability: ObservabilityConfig
    text: str
    shared: Mapping[str, object] = field(default_factory=dict)


class Trainer:
    """A training run on this rank: opens data and checkpoint, joins the other ranks, trains.

    Args:
        config: of the run.
        resume: `auto`, `none`, or the path or URL of a checkpoint or of a run root.
        launcher: processes whose end stops the run, after a save.

    Attributes:
        state: position of the run; `train` moves it to the end.
        ranks: this process among its peers.

    Raises:
        ConfigError, DataError, StorageError: see errors.py; on every rank.
    """

    def __init__(self, config: RunConfig, *, resume: str, launcher: Launcher) -> None:
        self.config = config
        self._rates: dict[str, float] = {}
        self.data = open_data(config.paths, config.data, config.loss, config.scoring)
        names = self.data.dataset.vocabulary
        self._sizes = {"num_objects": len(names.objects), "num_attributes": len(names.attributes)}
        self.store = open_store(config.paths.run)
        found = find_checkpoint(self.store, resume)
        if found is not None:
            found.check_resume(self._binding())
        with ExitStack() as stack:
            self.stop = StopRequest(launcher)
            stack.enter_context(handled(SIGNALS, self.stop.receive))
            training = config.training
            self.ranks = join_ranks(
                threads=training.threads,
                timeout_s=training.peer_timeout_s,
                stopped=lambda: self.stop.requested,
            )
            stack.enter_context(peers_needed())
            self.ranks.check_equal(
                {**self.data.digests(), **config.shared},
                remedy="Give every machine the same copy of the data and the same settings (vlal "
                "verify checks a copy), or train on one root that all of them see",
            )
            steps = self.ranks.texts(str(found.state.step) if found else "none")
            if len(set(steps)) > 1:
                raise DataError(
                    f"the ranks find checkpoints of different steps ({', '.join(steps)}); "
                    "paths.run must be one place that all ranks see"
                )
            self.ranks.together(self._check_shards)
            self.ranks.together(lambda: self._prepare(resume) if self.ranks.rank == 0 else None)
            self._build(found, stack)
            self._resources = stack.pop_all()

    def _check_shards(self) -> None:
        """Check the sizes of the shards; of local ones on each machine, which has its own copy."""
        for split in self.data.corpus.splits:
            if self.ranks.rank == 0 or (self.ranks.local_rank == 0 and not self.data.corpus.remote):
                check_shard_sizes(split, may_be_damaged=self.config.data.damage == "quarantine")
        if self.ranks.local_rank == 0:
            check_shard_sizes(self.data.validation)

    def _prepare(self, resume: str) -> None:
        """Check trackers and labels, and prepare the run root; on rank 0."""
        check_trackers(self.config.observability.trackers)
        self.data.check_validation(self.config.evaluation.unannotated)
        if self.config.loss.unannotated in ("draw", "top"):
            self.data.check_num_ignore(self.config.loss.num_ignore)
        if resume == "none":
            remove_run(self.store)
        self.store.sweep(BEST)
        self.store.replace("config.yaml", self.config.text.encode())
        own = {"digests": self.data.own_digests(self.config.paths.dataset)}
        self.store.replace(TRAINED_ON, (json.dumps(own, indent=2) + "\n").encode())

    def _build(self, found: Checkpoint | None, stack: ExitStack) -> None:
        """Make model, optimizer, loaders and reports, and fill them from a checkpoint."""
        config, ranks, data = self.config, self.ranks, self.data
        reference = Chosen("reference", "training.kernel says so")
        chosen = config.training.kernel == "reference"
        backend = ranks.together(lambda: reference if chosen else choose(ranks.device.type))
        logger.info("selective loss by backend %s: %s", *backend)
        self.metrics = open_metrics(
            stack,
            config.observability,
            ranks,
            store=self.store,
            cache=Path(config.paths.cache),
            kernel=backend.name,
        )
        first = found.state.binding if found else None
        self.loader = ranks.together(lambda: data.make_loader(config.training, ranks, first=first))
        stack.callback(self.loader.close)
        self._build_model()
        self.metrics.resumed(found.resume_kind(ranks.world_size) if found else "fresh")
        self.state = self._restore(found)
        here = found is not None and found.where.startswith(f"{self.store.url}/")
        self._saved = asdict(self.state) if here else {}
        step = self.state.step
        ranks.together(lambda: record_start(self.store, ranks, step=step, kernel=backend.name))
        builder = ranks.together(lambda: data.make_builder(ranks, train=False))
        stack.callback(builder.close)
        self.train_step = ranks.together(self._make_train_step)
        self.epoch_check = EpochCheck(
            ranks,
            self.state,
            num_samples=data.num_samples,
            max_quarantined=config.data.max_quarantined,
        )
        self.validator = Validator(
            builder,
            self.engine.module,
            ranks,
            groups=data.dataset.vocabulary.groups(),
            config=config.evaluation,
        )
        self.best = BestModel(self.store, self.engine.module, self._model_info())
        self.log = RunLog(
            stack, config.observability, ranks, store=self.store, metrics=self.metrics, step=step
        )

    def _build_model(self) -> None:
        """Make the model, its learning-rate schedule and the engine."""
        model_config, training = self.config.model, self.config.training
        model = build_model(model_config, **self._sizes, seed=training.seed)
        groups = parameter_groups(model, training, pretrained=model_config.weights is not None)
        self.schedule = Schedule(training, {group["name"]: group["lr"] for group in groups})
        self.engine = Engine(
            model,
            groups,
            self.ranks,
            training,
            micro_batches=self.loader.micro_batches_per_step,
        )

    def _make_train_step(self) -> TrainStep:
        """The step of Sec. 2.3, or of a row of Table 1."""
        loss, training, dataset = self.config.loss, self.config.training, self.data.dataset
        prior = None
        if loss.unannotated == "psl":
            names, micro_batches = dataset.vocabulary.attributes, self.loader.micro_batches_per_step
            prior = read_prior(loss.psl_prior, names, micro_batches=micro_batches)
        return TrainStep(
            self.engine,
            self.ranks,
            loss=loss,
            training=training,
            feasible=feasible_table(dataset.feasible, **self._sizes, device=self.ranks.device),
            psl_prior=prior,
        )

    def _restore(self, found: Checkpoint | None) -> TrainState:
        """Fill model, optimizer and schedule from a checkpoint, or start at step 0."""
        training = self.config.training
        batch = {
            "batch_size": training.batch_size,
            "accumulation": training.accumulation,
            "reference_batch": training.reference_batch,
            "world_size": self.ranks.world_size,
        }
        if found is None:
            lanes, micro_batches = self.loader.lanes, self.loader.micro_batches
            binding = replace(self._binding(), lanes=lanes, micro_batches=micro_batches)
            unannotated = self.config.evaluation.unannotated
            return TrainState(binding=binding, batch=batch, unannotated=unannotated)
        load_weights(self.engine.module, found.model, where=found.where)
        self.engine.restore_optimizer(found.optimizer, where=found.where)
        state = found.state
        self.schedule.restore(state.schedule)
        state.batch = batch
        unannotated = self.config.evaluation.unannotated
        same = state.unannotated == unannotated
        if not same or not holds_best(self.store, state):
            # Another run's, cut while being written, or judged by another rule: the first
            # validation makes a best model.
            state.best_map = state.best_step = None
        if not same:
            remark(
                logger,
                "evaluation.unannotated",
                "evaluation.unannotated is %s, and was %s before: scores cannot be compared, so "
                "the best model is chosen from here on",
                unannotated,
                state.unannotated,
            )
            self.schedule.forget()
            state.unannotated = unannotated
        return state

    def _binding(self) -> Binding:
        """What the run is bound to; lanes (0: automatic) and micro-batches as configured."""
        data, dataset = self.config.data, self.data.dataset
        return Binding(
            dataset_digest=dataset.digest,
            vocabulary_digest=dataset.vocabulary.digest,
            feasible_digest=dataset.feasible.digest,
            train_split=data.train_split,
            seed=self.config.training.seed,
            lanes=data.lanes,
            micro_batches=0,
            window_blocks=data.window_blocks,
            epoch_end=data.epoch_end,
            mix=self.data.mix,
            subset=self.data.subset,
            repeat_threshold=data.repeat_threshold,
        )

    def _model_info(self) -> SavedModelInfo:
        """Description of the best model; step, epoch and score are those of no model yet."""
        config, dataset = self.config, self.data.dataset
        return SavedModelInfo(
            config.model.model_copy(update={"weights": None}),
            **self._sizes,
            image_size=config.data.image_size,
            normalize=config.data.normalize,
            vocabulary_digest=dataset.vocabulary.digest,
            feasible_digest=dataset.feasible.digest,
            profile=config.loss.profile,
            loss=config.loss.loss,
            seed=config.training.seed,
            step=0,
            epoch=0,
            validation_map=0.0,
        )

    def train(self) -> None:
        """Train from `state` to the end, and close what the run opened.

        A checkpoint in between that cannot be written is logged and counted: training goes on.

        Raises:
            Stopped: a signal came; a checkpoint was written, the same command resumes.
            DataError: a sample could not be read, or a loss was not finite; on every rank.
            StorageError: the last checkpoint could not be written; on every rank.
        """
        state, training = self.state, self.config.training
        with self._resources:
            (stopping,) = self.ranks.agree(self.stop.requested)
            if stopping:
                self._leave()
            while not self._finished():
                epoch_ended = self._train_epoch()
                if epoch_ended:
                    self.epoch_check.check_epoch(self.loader)
                mean_ap = self._validate()
                if epoch_ended:
                    # A run cut by max_steps has not reached the end that the schedule waits for; an
                    # epoch shorter than a batch (a small mixture) has trained nothing.
                    if state.consumed and self.schedule.observe(mean_ap):
                        self.log.cut(self.schedule.rates_at(self._progress()))
                    state.begin_epoch(state.epoch + 1)
                if self._finished() or state.epoch % training.checkpoint_epochs == 0:
                    saved = self._save()
                    if self._finished() and not saved:
                        raise StorageError(
                            "training is complete, but the last checkpoint was not written; make "
                            "room or restore the store, then repeat the command: it resumes from "
                            "the checkpoint before"
                        )
            self.metrics.state("done")

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch (True) or to `max_steps` (False)."""
        state, training = self.state, self.config.training
        self.metrics.state("training")
        self.engine.module.train()
        end = self.loader.end_of_epoch(state.epoch, state.consumed)
        steps = self.loader.epoch(state.epoch, state.consumed, self.epoch_check.quarantined)
        name = f"epoch {state.epoch + 1}/{training.epochs}"
        # Closing the generator cancels what it prepares ahead.
        with closing(steps), self.log.epoch(name, samples=end - state.consumed):  # type: ignore[type-var]
            while True:
                started = time.monotonic()
                # A rank that cannot read a sample stops the others before their forward pass.
                step, wait_s = self.ranks.together(lambda: self._next_step(steps))
                if step is None:
                    return True
                stopping = self._train_step(step, wait_s=wait_s, started=started)
                self.log.advance(step.samples)
                last, enough = state.consumed >= end, self._at_max_steps()
                if state.step % training.log_steps == 0 or last or stopping or enough:
                    self.epoch_check.settle()
                    self.log.interval(state, self.train_step, self.loader, rates=self._rates)
                if stopping:
                    self._leave()
                every = training.checkpoint_steps
                if every and state.step % every == 0 and not last:
                    self._save()
                    self.metrics.state("training")
                if enough:
                    return last

    def _next_step(self, steps: Iterator[Step]) -> tuple[Step | None, float]:
        """The next step, decoded, and the seconds that this rank waited for it."""
        started = time.monotonic()
        step = next(steps, None)
        if step is not None:
            device = self.ranks.device
            step.micro_batches = [decoded(batch, device) for batch in step.micro_batches]
        return step, time.monotonic() - started

    def _train_step(self, step: Step, *, wait_s: float, started: float) -> bool:
        """Forward, backward, optimizer step; returns whether some rank was asked to stop."""
        state = self.state
        self._rates = self.schedule.rates_at(self._progress())
        self.engine.set_rates(self._rates)
        logged = (state.step + 1) % self.config.training.log_steps == 0
        self.train_step.accumulate(step, sampled=logged)
        diverged, stopping, damaged = self.ranks.agree(
            not self.train_step.is_finite(), self.stop.requested, bool(step.damaged)
        )
        if diverged:
            self.metrics.state("failed")
            self.metrics.refused()
            self.train_step.refuse(state.step)
        self.train_step.apply()
        state.step += 1
        state.consumed = step.position
        self.epoch_check.enter(step)
        if damaged:
            self.epoch_check.quarantine(step.damaged)
        self.metrics.step(
            epoch=state.epoch,
            step=state.step,
            rows=sum(len(batch) for batch in step.micro_batches),
            wait_s=wait_s,
            duration_s=time.monotonic() - started,
        )
        return stopping

    def _validate(self) -> float | None:
        """Score the validation split, keep the model if it is the best; returns mAP.

        Where the mAP is undefined (None), which lies in the labels of the split, each validation
        keeps the model: the latest is the best.

        Signals are obeyed before each batch. A validation that fails leaves a checkpoint, so that
        the steps of the epoch are not lost: the same command validates again.
        """
        self.metrics.state("evaluating")
        state, split = self.state, self.config.data.validation_split
        try:
            evaluation = self.validator.evaluate(self.stop)
        except Stopped:
            self._leave()
        except VlalError:
            self._save()
            raise
        mean_ap = evaluation.mAP
        is_best = state.best_map is None or (mean_ap is not None and mean_ap > state.best_map)
        if is_best:
            state.best_map, state.best_step = mean_ap, state.step
            self._on_rank_0(lambda: self.best.keep(state), "the best model")
        self.log.validation(state, evaluation, split=split, mean_ap=mean_ap, best=is_best)
        return mean_ap

    def _save(self) -> bool:
        """Write a checkpoint unless the last one is up to date; returns whether one is."""
        self.metrics.state("saving")
        self.log.flush()
        self.epoch_check.settle()
        self.state.schedule = self.schedule.state()
        now = asdict(self.state)
        if now == self._saved:
            return True
        optimizer = self.engine.optimizer_tensors(keep=self.ranks.rank == 0)

        def write() -> None:
            started = time.monotonic()
            weights, keep = self.engine.module.state_dict(), self.config.training.keep_checkpoints
            size_bytes = save_checkpoint(self.store, self.state, weights, optimizer, keep=keep)
            self.metrics.saved(seconds=time.monotonic() - started, size_bytes=size_bytes)

        written = self._on_rank_0(write, "the checkpoint")
        if written and (written := self._on_rank_0(self.best.write, "the best model")):
            self._saved = now
        return written

    def _on_rank_0(self, write: Callable[[], None], what: str) -> bool:
        """Write on rank 0 what training can go on without; every rank gets whether that worked."""

        def fails() -> bool:
            try:
                if self.ranks.rank == 0:
                    write()
            except (StorageError, ConflictError) as error:
                self.metrics.save_failed(failure_reason(error))
                logger.error("step %d: %s was not written: %s", self.state.step, what, error)
                return True
            return False

        (failed,) = self.ranks.agree(self.ranks.together(fails))
        return not failed

    def _leave(self) -> NoReturn:
        """Save and raise `Stopped`."""
        state = self.state
        self.metrics.state("stopping")
        if self.stop.received:
            self.metrics.stopped_by(self.stop.received)
        reason = self.stop.received or "a signal to another rank"
        stopped = (
            f"stopped by {reason} after step {state.step} (epoch {state.epoch}, "
            f"{state.consumed} samples in)"
        )
        if state.step > 0 and not self._save():
            raise StorageError(
                f"{stopped}, but the checkpoint was not written; the same command resumes from the "
                "checkpoint before"
            )
        raise Stopped(f"{stopped}; the same command resumes")

    def _progress(self) -> float:
        """Share of the run that is done, by samples: a resume with another B does not move it."""
        state, training = self.state, self.config.training
        length = self.loader.stream.length(state.epoch)
        share = (state.epoch + state.consumed / max(1, length)) / training.epochs
        return max(share, state.step / training.max_steps) if training.max_steps else share

    def _at_max_steps(self) -> bool:
        max_steps = self.config.training.max_steps
        return max_steps is not None and self.state.step >= max_steps

    def _finished(self) -> bool:
        return self.state.epoch >= self.config.training.epochs or self._at_max_steps()


def remove_run(store: Store) -> None:
    """Remove checkpoints and best model of an earlier run (`--resume none`)."""
    old = complete_checkpoints(store)
    if old:
        logger.warning("--resume none: removing %d checkpoints of an earlier run", len(old))
    # The description goes first: evaluate ignores weights without it.
    for key in (f"{BEST}/model.json", f"{BEST}/model.safetensors"):
        store.delete(key)
    for prefix in old:
        discard(store, prefix)
