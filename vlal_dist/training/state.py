"""Where a run stands, and what may not change under it: the plain values of `state.json`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from vlal_dist.data.ledger import Ledger
from vlal_dist.errors import DataError


@dataclass(frozen=True)
class Binding:
    """What the order of samples and the meaning of the weights depend on; fixed at the first start.

    Attributes:
        dataset_digest, vocabulary_digest, feasible_digest: of the data trained on.
        train_split: its split.
        seed: of order, flips and draws.
        lanes: parallel lanes of an epoch.
        micro_batches: M.
        window_blocks: shuffle window.
        epoch_end: `drop` or `exact`.
        mix: digest and passes of each dataset, where there is more than the one.
        subset: sha256 of the list of keys that is trained on; empty: all.
        repeat_threshold: of the repeat factors; 0: none.
    """

    dataset_digest: str
    vocabulary_digest: str
    feasible_digest: str
    train_split: str
    seed: int
    lanes: int
    micro_batches: int
    window_blocks: int
    epoch_end: str
    mix: str = ""
    subset: str = ""
    repeat_threshold: float = 0.0


@dataclass
class TrainState:
    """Where a run stands; all of `state.json` but the format.

    Attributes:
        binding: what may not change under a run.
        epoch: 0-based epoch of the next sample.
        consumed: visits of that epoch already trained on or left out.
        ledger, left_out: `Ledger`s of the epoch's visits so far: trained on, and quarantined.
        quarantined: uid (16 hex digits) -> where and why.
        step: optimizer steps since the start.
        best_map: best validation mAP so far, a share of 1.
        best_step: the step that it was found at.
        schedule: `Schedule.state()`.
        batch: batch_size, accumulation, reference_batch, world_size of the last start; these may
            change at a resume, and are kept to tell so.
    """

    binding: Binding
    epoch: int = 0
    consumed: int = 0
    ledger: dict[str, int] = field(default_factory=Ledger().to_json)
    left_out: dict[str, int] = field(default_factory=Ledger().to_json)
    quarantined: dict[str, str] = field(default_factory=dict)
    step: int = 0
    best_map: float | None = None
    best_step: int | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, int] = field(default_factory=dict)

    def begin_epoch(self, epoch: int) -> None:
        """Move on to the first visit of an epoch, with new books."""
        self.epoch, self.consumed = epoch, 0
        self.ledger, self.left_out = Ledger().to_json(), Ledger().to_json()


def check_binding(stored: Binding, wanted: Binding, *, where: str) -> None:
    """Refuse to continue a run on other data or in another order.

    Args:
        stored: what the checkpoint is bound to.
        wanted: what this start is bound to; 0 (lanes, micro-batches) takes what is stored.
        where: the checkpoint, for the message.

    Raises:
        DataError: naming each field that differs, with both values.
    """
    before = asdict(stored)
    differing = [
        f"{name} is {value}, the checkpoint has {before[name]}"
        for name, value in asdict(wanted).items()
        if value != before[name] and not (value == 0 and name in ("lanes", "micro_batches"))
    ]
    if differing:
        raise DataError(
            f"{where} cannot be resumed: {'; '.join(differing)}. Restore these, or train anew "
            "with another --paths.run (or --resume none)"
        )
