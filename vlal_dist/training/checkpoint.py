"""Checkpoints: complete or ignored, without pickle, readable by any number of ranks.

    checkpoints/00001200/model.safetensors       parameters and buffers
                         optimizer.safetensors   NAME.exp_avg, NAME.exp_avg_sq, NAME.step
                         state.json              position, schedule, binding
                         COMPLETE                sha256 of the three; written last

A folder without COMPLETE, or whose files differ from it, is never loaded; the next save removes it.
Files go through `Store`, so a run root may be a folder or a bucket. The files are the same with
ZeRO 0, 1 and 2 (docs/training.md).
"""

import itertools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from vlal_dist.contents import Count, Share, parse_json, shown
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.errors import DataError, NotFoundError, StorageError, VlalError, bounded
from vlal_dist.release.saved_model import read_verified
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import Store, open_store

logger = logging.getLogger(__name__)

FORMAT = 2
FOLDER = "checkpoints"
MODEL, OPTIMIZER, STATE, COMPLETE = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "COMPLETE",
)


ADDED = {"unannotated"}
"""Fields of `TrainState` that the first checkpoints of this format lack."""


@dataclass(frozen=True)
class Binding:
    """What the order of samples and the meaning of the weights depend on; fixed at the first start.

    Attributes:
        dataset_digest, vocabulary_digest, feasible_digest: of the dataset trained on.
        train_split: its split.
        seed: of order, flips and draws.
        lanes: parallel lanes of an epoch.
        micro_batches: M, of a step over all ranks.
        window_blocks: shuffle window.
        epoch_end: `drop` or `exact`.
        mix: digest and passes of each dataset of a mixture; empty: a single dataset.
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
    """Position of a run; all of `state.json` but the format.

    Attributes:
        binding: what may not change within a run.
        epoch: 0-based epoch of the next sample.
        consumed: visits of that epoch already trained on or left out.
        ledger, left_out: visits of the epoch so far: trained on, and of quarantined samples.
        quarantined: uid (16 hex digits) -> where and why.
        step: optimizer steps since the start.
        best_map: best validation mAP so far, a share of 1; None: no validation yet, or undefined.
        best_step: step of that validation; of the latest where the mAP is undefined.
        unannotated: what unannotated pairs counted as in these validations.
        schedule: `Schedule.state()`.
        batch: batch_size, accumulation, reference_batch, world_size of the last start; these may
            change at a resume and are only logged.
    """

    binding: Binding
    epoch: Count = 0
    consumed: Count = 0
    ledger: Ledger = field(default_factory=Ledger)
    left_out: Ledger = field(default_factory=Ledger)
    quarantined: dict[str, str] = field(default_factory=dict)
    step: Count = 0
    best_map: Share | None = None
    best_step: Count | None = None
    unannotated: Literal["excluded", "negative"] = "excluded"
    schedule: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, int] = field(default_factory=dict)

    def begin_epoch(self, epoch: int) -> None:
        """Move to the first visit of an epoch, with empty ledgers."""
        self.epoch, self.consumed = epoch, 0
        self.ledger = self.left_out = Ledger()


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, its digests verified.

    Attributes:
        where: its URL, for messages.
        state: position of the run.
        model: `state_dict` of the model, on the CPU.
        optimizer: Adam's state (optimizer_state.py), on the CPU.
        skipped: newer checkpoints that were damaged.
    """

    where: str
    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    skipped: int = 0

    def check_resume(self, wanted: Binding) -> None:
        """Refuse to resume on other data or in another order; else log where the run continues.

        Args:
            wanted: binding of this start; 0 (lanes, micro-batches) accepts what is stored.

        Raises:
            DataError: naming each field that differs, with both values.
        """
        stored = asdict(self.state.binding)
        differing = [
            f"{name} is {value}, the checkpoint has {stored[name]}"
            for name, value in asdict(wanted).items()
            if value != stored[name] and not (value == 0 and name in ("lanes", "micro_batches"))
        ]
        if differing:
            raise DataError(
                f"{self.where} cannot be resumed: {'; '.join(differing)}. Restore these settings, "
                "or start a new run with another --paths.run (or --resume none)"
            )
        logger.info(
            "resuming %s: step %d, epoch %d, %d samples in; last start: %s",
            self.where,
            self.state.step,
            self.state.epoch + 1,
            self.state.consumed,
            ", ".join(f"{name} {value}" for name, value in self.state.batch.items()),
        )

    def resume_kind(self, world_size: int) -> str:
        """How a run on so many ranks continues from it, one of `RESUME_KINDS`."""
        if self.skipped:
            return "fallback"
        return "exact" if self.state.batch.get("world_size") == world_size else "resharded"


def save_checkpoint(
    store: Store,
    state: TrainState,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    keep: int,
) -> int:
    """Write a checkpoint, then remove all but it and the newest before it, `keep` in all.

    Args:
        store: root of the run, where no other process writes.
        state: position of the run.
        model: its `state_dict`.
        optimizer: Adam's state (optimizer_state.py).
        keep: how many complete checkpoints stay, at least 1.

    Returns:
        Its size in bytes, without COMPLETE.

    Raises:
        StorageError: it could not be written; older ones are untouched.
    """
    complete = complete_checkpoints(store)
    # First remove saves that were cut short or failed: they take room.
    found = {key.rpartition("/")[0] for key in store.list_keys(f"{FOLDER}/")}
    for prefix in sorted(found - set(complete)):
        discard(store, prefix)
    store.sweep(FOLDER)
    # A complete checkpoint is never overwritten: a second save at one step (after its validation,
    # which may find a best model) gets a suffix, and sorts behind the first.
    first = f"{FOLDER}/{state.step:08d}"
    prefixes = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(1)))
    newest = next(prefix for prefix in prefixes if prefix not in complete)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.items()}
    files = {
        MODEL: safetensors.torch.save(weights),
        OPTIMIZER: safetensors.torch.save(dict(optimizer)),
        STATE: (json.dumps({"format": FORMAT, **asdict(state)}, indent=2) + "\n").encode(),
    }
    digests = {name: sha256_of(data) for name, data in files.items()}
    files[COMPLETE] = (json.dumps(digests, indent=2) + "\n").encode()
    for name, data in files.items():
        store.create(f"{newest}/{name}", data)
    # Older ones than `keep`, and later ones that the run went back from.
    kept = sorted((p for p in [newest, *complete] if p <= newest), reverse=True)[:keep]
    try:
        for prefix in sorted(set(complete) - set(kept)):
            discard(store, prefix)
        store.sweep(FOLDER)
    except StorageError as error:
        logger.warning("an old checkpoint was not removed, the next save retries: %s", error)
    return sum(len(files[name]) for name in digests)


def complete_checkpoints(store: Store) -> list[str]:
    """Key prefixes of the checkpoints that have COMPLETE, newest first."""
    keys = store.list_keys(f"{FOLDER}/")
    return sorted(key.rpartition("/")[0] for key in keys if key.endswith(f"/{COMPLETE}"))[::-1]


def discard(store: Store, prefix: str) -> None:
    """Remove a checkpoint, COMPLETE first, so that a half-removed one is not taken for complete."""
    for name in (COMPLETE, MODEL, OPTIMIZER, STATE):
        store.delete(f"{prefix}/{name}")


def find_checkpoint(store: Store, resume: str) -> Checkpoint | None:
    """The checkpoint that `--resume` selects; every rank finds the same.

    Args:
        store: root of the run.
        resume: `auto` (the newest complete one, or none), `none`, or the path or URL of a
            checkpoint folder or of a run root.

    Raises:
        DataError: the one named is absent or damaged, or there are some but all are damaged.
    """
    if resume == "none":
        return None
    named = resume != "auto"
    if named:
        store = open_store(resume)
        if store.exists(COMPLETE):
            return read_checkpoint(store, "")
    prefixes = complete_checkpoints(store)
    for skipped, prefix in enumerate(prefixes):
        try:
            return replace(read_checkpoint(store, prefix), skipped=skipped)
        except (DataError, NotFoundError) as error:
            logger.warning("falling back to an older checkpoint: %s", error)
    if named or prefixes:
        raise DataError(
            f"{store.url} holds no complete checkpoint ({len(prefixes)} damaged); give --resume "
            "the folder of one, or --resume none to start over"
        )
    return None


def read_checkpoint(store: Store, prefix: str) -> Checkpoint:
    """Read one checkpoint and check it against COMPLETE.

    Raises:
        NotFoundError: a file is absent.
        DataError: a file is damaged, or of another format.
    """
    folder = f"{prefix}/" if prefix else ""
    where, remedy = f"{store.url}/{prefix}".rstrip("/"), "resume an older checkpoint"
    try:
        data = store.read(f"{folder}{COMPLETE}")
        digests = parse_json(data, dict[str, str], where=f"{where}/{COMPLETE}", remedy=remedy)
        files = {
            name: read_verified(store, f"{folder}{name}", sha256=digests[name], remedy=remedy)
            for name in (MODEL, OPTIMIZER, STATE)
        }
        named = f"{where}/{STATE}"
        values = parse_json(files[STATE], dict[str, Any], where=named, remedy=remedy)
        if values["format"] != FORMAT:
            raise DataError(
                f"{where} has format {shown(values['format'])}; this version reads {FORMAT}"
            )
        state: TrainState = parse_json(files[STATE], TrainState, where=named, remedy=remedy)
        needed = {item.name for item in fields(TrainState)} - ADDED
        missing = sorted(needed - set(values))
        if missing:
            raise DataError(f"{named} lacks {', '.join(missing)}; {remedy}")
        model, optimizer = (safetensors.torch.load(files[name]) for name in (MODEL, OPTIMIZER))
    except VlalError:
        raise
    except Exception as error:  # tensors of others raise any type, OverflowError too
        raise DataError(f"{where} is damaged ({bounded(repr(error))}); {remedy}") from None
    return Checkpoint(where, state, model, optimizer)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Fill a model.

    Raises:
        DataError: other names or shapes.
    """
    try:
        with torch.no_grad():
            model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise DataError(
            f"{where}: {MODEL} does not fit ({error}); use the model settings of the run"
        ) from None
