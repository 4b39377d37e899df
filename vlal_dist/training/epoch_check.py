"""Epoch accounting: verifies that every planned sample was trained on exactly once."""

import json
import logging
from collections.abc import Sequence

from vlal_dist.data.hashing import uid_from_hex, uid_to_hex, unsigned_uids
from vlal_dist.data.loading.loader import Step, TrainLoader
from vlal_dist.data.loading.shard_reader import Damage
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.errors import DataError, VlalError
from vlal_dist.training.checkpoint import TrainState
from vlal_dist.training.ranks import Ranks

logger = logging.getLogger(__name__)

_NAMED = 5
"""Damaged samples that an error lists."""


class EpochCheck:
    """Counts the visits of this rank, and keeps ledgers and quarantine of the run's state.

    Args:
        ranks: this process among its peers.
        state: its `ledger`, `left_out` and `quarantined` are updated.
        num_samples: samples that are trained on, over all datasets.
        max_quarantined: share of them that may be quarantined; above 0 it allows one at least.

    Attributes:
        quarantined: uids that are left out.
    """

    def __init__(
        self, ranks: Ranks, state: TrainState, *, num_samples: int, max_quarantined: float
    ) -> None:
        self._ranks, self._state = ranks, state
        self._allowed = max(int(max_quarantined * num_samples), int(max_quarantined > 0))
        self._max_quarantined = max_quarantined
        self._trained = self._left_out = Ledger()
        self.quarantined = {uid_from_hex(uid) for uid in state.quarantined}

    def enter(self, step: Step) -> None:
        """Count the rows of a step that was applied."""
        for batch in step.micro_batches:
            real = batch.row_weight > 0
            uid = unsigned_uids(batch.uid[real].numpy())
            self._trained += Ledger.of(uid, batch.visit[real].numpy())
        self._left_out += step.left_out

    def quarantine(self, damaged: Sequence[Damage]) -> None:
        """Quarantine the damaged samples of all ranks; every rank must call.

        Raises:
            DataError: more are damaged than `data.max_quarantined` allows; on every rank.
        """
        own = json.dumps({uid_to_hex(one.uid): f"{one.where}: {one.check}" for one in damaged})
        quarantined = self._state.quarantined
        for text in self._ranks.texts(own):
            for uid, reason in json.loads(text).items():
                if uid not in quarantined:
                    logger.warning("quarantined sample uid %s: %s", uid, reason)
                    quarantined[uid] = reason
                    self.quarantined.add(uid_from_hex(uid))
        if len(quarantined) > self._allowed:
            first = [f"uid {uid}: {why}" for uid, why in list(quarantined.items())[:_NAMED]]
            raise DataError(
                f"{len(quarantined)} samples are damaged, data.max_quarantined "
                f"{self._max_quarantined} allows {self._allowed}: {'; '.join(first)}. "
                "Run vlal verify and restore the shards"
            )

    def settle(self) -> None:
        """Add the visits since the last call to the state's ledgers; every rank must call."""
        trained, left_out = self._over_ranks(self._trained, self._left_out)
        self._state.ledger += trained
        self._state.left_out += left_out
        self._trained = self._left_out = Ledger()

    def check_epoch(self, loader: TrainLoader) -> None:
        """Compare a finished epoch, which ended at `state.consumed`, with its plan; every rank.

        Raises:
            VlalError: a visit too many or too few; on every rank.
        """
        self.settle()
        state, rank, world_size = self._state, self._ranks.rank, self._ranks.world_size
        rows = len(loader.plan.corpus)
        share = rows * rank // world_size, rows * (rank + 1) // world_size
        (planned,) = self._over_ranks(loader.plan.ledger(state.epoch, *share))
        length = loader.stream.length(state.epoch)
        planned -= loader.ledger_of(state.epoch, state.consumed, length)  # the dropped end
        found = state.ledger + state.left_out
        if found != planned:
            raise VlalError(_explain(loader, state.epoch, planned - found))
        logger.info(
            "epoch %d: ledger equals the plan: %d visits trained on, %d left out",
            state.epoch + 1,
            state.ledger.count,
            state.left_out.count,
        )

    def _over_ranks(self, *own: Ledger) -> list[Ledger]:
        """The sum of each ledger over ranks; its 64-bit sum travels in two halves."""
        parts = [part for one in own for part in (one.count, one.sum & 0xFFFFFFFF, one.sum >> 32)]
        totals = iter(self._ranks.total(*parts))
        return [
            Ledger(count, (low + (high << 32)) % 2**64)
            for count, low, high in zip(totals, totals, totals, strict=True)
        ]


def _explain(loader: TrainLoader, epoch: int, missing: Ledger) -> str:
    what = f"{abs(missing.count)} visits too {'few' if missing.count > 0 else 'many'}"
    if missing.count == 0:
        what = "as many visits as planned, but not the same"
    one = Ledger() - missing if missing.count < 0 else missing
    uid = loader.plan.find(epoch, one) if one.count == 1 else None
    named = "" if uid is None else f" (sample uid {uid_to_hex(uid)})"
    return (
        f"epoch {epoch + 1}: the ledger differs from the plan: {what}{named}. This is a bug: "
        "please report it with the run's state.json"
    )
