"""What a run says of itself while it trains: metrics, `metrics.jsonl`, log lines, the bar."""

import errno
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from vlal_dist.errors import ConflictError, StorageError, VlalError
from vlal_dist.method.metrics import AttributeScores, Evaluation
from vlal_dist.observability.logs import Progress
from vlal_dist.observability.metric_definitions import TERM_KINDS
from vlal_dist.training.parts import Run

logger = logging.getLogger(__name__)

PARTS = {"base_decay": "backbone", "fast_decay": "head"}
"""Parameter groups whose rates are shown, and under which name."""


def publish_interval(run: Run, *, samples_per_s: float) -> float:
    """Reduce and publish what happened since the last time; returns the mean loss of a row."""
    run.account.settle()
    own = run.train_step.take_tally()
    means = own.over_ranks(run.ranks).per_row()
    shown = {PARTS[name]: rate for name, rate in run.rates.items() if name in PARTS}
    run.metrics.interval(
        loss={
            name.removeprefix("loss_").replace("loss", "total"): value
            for name, value in means.items()
            if name.startswith("loss")
        },
        rates=shown,
        term_counts=dict(zip(TERM_KINDS, (int(n) for n in own.pairs.tolist()), strict=True)),
        ignored=means["ignored_effective"],
        grad_norm=run.train_step.grad_norm(),
        visits={
            "trained": run.state.ledger["count"],
            "left_out": run.state.left_out["count"],
        },
        quarantined=len(run.state.quarantined),
    )
    run.metrics.times(run.train_step.take_times())
    run.metrics.loader(run.loader.numbers())
    if run.log is not None:
        run.log.write(
            {
                "kind": "train",
                "epoch": run.state.epoch,
                "step": run.state.step,
                **means,
                "ledger": dict(run.state.ledger),
                "quarantined": len(run.state.quarantined),
                "samples_per_s": samples_per_s,
                "lr": shown,
            }
        )
    return means["loss"]


def publish_validation(run: Run, evaluation: Evaluation, *, mean_ap: float, better: bool) -> None:
    """Publish the scores of the validation split."""
    state, groups = run.state, evaluation.groups
    overall = groups["overall"]
    by_group = {name: float(g["mAP"]) for name, g in groups.items() if g["mAP"] is not None}
    run.metrics.validation(
        split=run.settings.validation_split,
        mean_ap=by_group,
        attributes=attribute_status(evaluation.attributes),
    )
    if run.log is not None:
        record = {"kind": "validation", "epoch": state.epoch, "step": state.step}
        run.log.write({**record, **overall, "mAP": mean_ap, "groups": by_group, "best": better})
        flush_log(run)
    logger.info(
        "epoch %d, step %d: mAP %.4f on %s over %s attributes%s",
        state.epoch + 1,
        state.step,
        mean_ap,
        run.settings.validation_split,
        overall["num_classes"],
        ", the best so far" if better else f", best {state.best_map:.4f}",
    )


def attribute_status(scores: AttributeScores) -> dict[str, int]:
    """How many attributes have an AP, and why the others have none; sums to A."""
    positive, negative = scores.num_positive > 0, scores.num_negative > 0
    return {
        "scored": int((positive & negative).sum()),
        "no_positive": int((~positive & negative).sum()),
        "no_negative": int((positive & ~negative).sum()),
        "unannotated": int((~positive & ~negative).sum()),
    }


def save_and_publish(run: Run, optimizer: Mapping[str, Tensor]) -> bool:
    """Write a checkpoint, publish what it took; returns whether it was written."""

    def write() -> None:
        started = time.monotonic()
        size_bytes = run.save_state(run.state, optimizer)
        run.metrics.saved(seconds=time.monotonic() - started, size_bytes=size_bytes)

    return written(run, write, what="the checkpoint")


def written(run: Run, write: Callable[[], None], *, what: str) -> bool:
    """Write something that training can go on without.

    Returns:
        Whether it was written; if a disk or store refused, that is told and counted.
    """
    try:
        write()
    except (StorageError, ConflictError) as error:
        run.metrics.save_failed(failure_reason(error))
        logger.error("step %d: %s was not written: %s", run.state.step, what, error)
        return False
    return True


def failure_reason(error: VlalError) -> str:
    """Which of `SAVE_FAILURES` an error of a store is."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    return "io" if isinstance(error, StorageError) else "other"


def flush_log(run: Run) -> None:
    """Bring `metrics.jsonl` to a remote run root; a failure is told and stops nothing."""
    if run.log is None:
        return
    try:
        run.log.flush()
    except VlalError as error:
        logger.warning("metrics.jsonl was not written, the next attempt holds all: %s", error)


def epoch_progress(run: Run, *, left: int) -> AbstractContextManager[Progress | None]:
    """The bar of an epoch, on rank 0."""
    if run.ranks.rank != 0:
        return nullcontext()
    return Progress(epoch_label(run, None), total=left, unit="samples")


def epoch_label(run: Run, loss: float | None) -> str:
    """What the bar says."""
    shown = "" if loss is None else f", loss {loss:.4g}"
    return f"epoch {run.state.epoch + 1}/{run.settings.epochs}{shown}"
