"""The books of an epoch: the ledger against the plan, and the samples that were quarantined."""

import json
import logging
from collections.abc import Sequence

from vlal_dist.data.loading.loader import Step, TrainLoader
from vlal_dist.data.loading.shard_reader import Damage
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.errors import DataError, VlalError
from vlal_dist.training.checkpoint import TrainState
from vlal_dist.training.ranks import Ranks

logger = logging.getLogger(__name__)

_LOW = (1 << 32) - 1
_NAMED = 5


class EpochCheck:
    """What this rank has to enter into the books of the run.

    Args:
        ranks: this process among its peers.
        state: the books: ledger, left_out, quarantined.
        num_samples: samples that are trained on, over all datasets.
        max_quarantined: share of them that may be quarantined; above 0 it allows one at least.
    """

    def __init__(
        self, ranks: Ranks, state: TrainState, *, num_samples: int, max_quarantined: float
    ) -> None:
        self._ranks, self._state = ranks, state
        self._allowed = max(int(max_quarantined * num_samples), int(max_quarantined > 0))
        self._max_quarantined = max_quarantined
        self._trained, self._left_out = Ledger(), Ledger()
        self.quarantined = {int(uid, 16) for uid in state.quarantined}

    def enter(self, step: Step) -> None:
        """Count the rows of a step that was applied."""
        for batch in step.micro_batches:
            real = batch.row_weight > 0
            uid = batch.uid[real].numpy().view("uint64")
            self._trained += Ledger.of(uid, batch.visit[real].numpy())
        self._left_out += step.left_out

    def quarantine(self, damaged: Sequence[Damage]) -> None:
        """Put the damaged samples of all ranks on the list; every rank must call.

        Raises:
            DataError: more are damaged than the run allows; on every rank.
        """
        own = json.dumps({f"{one.uid:016x}": f"{one.where}: {one.check}" for one in damaged})
        for text in self._ranks.texts(own):
            for uid, reason in json.loads(text).items():
                if uid not in self._state.quarantined:
                    logger.warning("quarantined sample uid %s: %s", uid, reason)
                    self._state.quarantined[uid] = reason
                    self.quarantined.add(int(uid, 16))
        found = self._state.quarantined
        if len(found) > self._allowed:
            first = "; ".join(f"uid {uid}: {why}" for uid, why in list(found.items())[:_NAMED])
            raise DataError(
                f"{len(found)} samples are damaged, data.max_quarantined {self._max_quarantined} "
                f"allows {self._allowed}: {first}. Run shard_tools verify and restore the shards"
            )

    def settle(self) -> None:
        """Add what this rank entered since the last time to the books; every rank must call."""
        own = (self._trained, self._left_out)
        parts = [part for one in own for part in (one.count, one.sum & _LOW, one.sum >> 32)]
        totals = self._ranks.total(*parts)
        for name, (count, low, high) in zip(
            ("ledger", "left_out"), (totals[:3], totals[3:]), strict=True
        ):
            added = Ledger(count, (low + (high << 32)) & ((1 << 64) - 1))
            books = Ledger.from_json(getattr(self._state, name)) + added
            setattr(self._state, name, books.to_json())
        self._trained, self._left_out = Ledger(), Ledger()

    def check_epoch(self, loader: TrainLoader, end: int) -> None:
        """Compare a finished epoch with its plan; every rank must call.

        Args:
            loader: the stream.
            end: where the epoch ended; later positions were dropped.

        Raises:
            VlalError: a visit too many or too few; on every rank.
        """
        self.settle()
        state, plan = self._state, loader.plan
        rank, world_size, rows = self._ranks.rank, self._ranks.world_size, len(plan.corpus)
        share = rows * rank // world_size, rows * (rank + 1) // world_size
        own = plan.ledger(state.epoch, *share)
        count, low, high = self._ranks.total(own.count, own.sum & _LOW, own.sum >> 32)
        planned = Ledger(count, (low + (high << 32)) & ((1 << 64) - 1))
        planned -= loader.ledger_of(state.epoch, end, loader.stream.length(state.epoch))
        found = Ledger.from_json(state.ledger) + Ledger.from_json(state.left_out)
        if found != planned:
            raise VlalError(_explain(loader, state.epoch, planned - found))
        logger.info(
            "epoch %d: ledger equals the plan: %d visits trained on, %d left out",
            state.epoch + 1,
            state.ledger["count"],
            state.left_out["count"],
        )


def _explain(loader: TrainLoader, epoch: int, missing: Ledger) -> str:
    what = f"{abs(missing.count)} visits too {'few' if missing.count > 0 else 'many'}"
    if missing.count == 0:
        what = "as many visits as planned, but not the same"
    one = Ledger() - missing if missing.count < 0 else missing
    uid = loader.plan.find(epoch, one) if one.count == 1 else None
    named = "" if uid is None else f" (sample uid {uid:016x})"
    return (
        f"epoch {epoch + 1}: the ledger differs from the plan: {what}{named}. This must not "
        "happen: please report it with the run's state.json"
    )
