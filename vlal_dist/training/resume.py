"""Continuing a run: may it be continued, and from where."""

import logging
from collections.abc import Mapping

from vlal_dist.errors import DataError
from vlal_dist.storage.store import Store
from vlal_dist.training.best_model import BEST, holds_best
from vlal_dist.training.checkpoint import (
    Binding,
    Checkpoint,
    TrainState,
    check_binding,
    complete_checkpoints,
    discard,
    load_weights,
)
from vlal_dist.training.engine import Engine
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.schedule import Schedule

logger = logging.getLogger(__name__)


def check_resume(found: Checkpoint | None, wanted: Binding) -> None:
    """Refuse what cannot be continued, and say what will be.

    Args:
        found: the checkpoint, if there is one.
        wanted: what this start is bound to, as far as it is known.

    Raises:
        DataError: other data, or another order.
    """
    if found is None:
        return
    check_binding(found.state.binding, wanted, where=found.where)
    logger.info(
        "resuming %s: step %d, epoch %d, %d samples in; last start: %s",
        found.where,
        found.state.step,
        found.state.epoch + 1,
        found.state.consumed,
        ", ".join(f"{name} {value}" for name, value in found.state.batch.items()),
    )


def agree_on(found: Checkpoint | None, ranks: Ranks) -> None:
    """Check that every rank sees the checkpoint that rank 0 sees.

    Raises:
        DataError: it does not; the run root is not one place.
    """
    own = found.state.step if found else -1
    (first,) = ranks.from_rank_0(own)
    (differs,) = ranks.agree(own != first)
    if differs:
        raise DataError(
            f"rank {ranks.rank} finds the checkpoint of step {own}, rank 0 that of step {first} "
            "(-1: none); paths.run must be one place, seen by all ranks"
        )


def begin_anew(store: Store) -> None:
    """Forget the run that was here (`--resume none`)."""
    old = complete_checkpoints(store)
    if old:
        logger.warning("--resume none: %d checkpoints of an earlier run are removed", len(old))
    # The description goes first: without it evaluate takes the weights for no model.
    for key in (f"{BEST}/model.json", f"{BEST}/model.safetensors"):
        if store.exists(key):
            store.delete(key)
    for prefix in old:
        discard(store, prefix)


def resume_kind(found: Checkpoint | None, *, world_size: int) -> str:
    """How a run begins, one of `RESUME_KINDS`; asked before `restore`, which moves the state on."""
    if found is None:
        return "fresh"
    if found.skipped:
        return "fallback"
    return "exact" if found.state.batch.get("world_size") == world_size else "resharded"


def restore(
    found: Checkpoint | None,
    *,
    engine: Engine,
    schedule: Schedule,
    binding: Binding,
    batch: Mapping[str, int],
    store: Store,
) -> TrainState:
    """Fill model, optimizer and schedule from a checkpoint; or begin.

    Args:
        found: the checkpoint, if there is one.
        engine: model and optimizer, filled in place.
        schedule: filled in place.
        binding: of this start, lanes and micro-batches chosen.
        batch: batch settings of this start.
        store: the run root. A best model there that is not the checkpoint's (it is another run's,
            or was cut while being saved) counts as none: the first validation makes one.
    """
    if found is None:
        return TrainState(binding=binding, batch=dict(batch))
    load_weights(engine.module, found.model, where=found.where)
    engine.restore_optimizer(found.optimizer, where=found.where)
    state = found.state
    schedule.restore(state.schedule)
    state.batch = dict(batch)
    if not holds_best(store, state):
        state.best_map = state.best_step = None
    return state
