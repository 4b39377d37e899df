"""What a run says of itself while it trains: metrics, `metrics.jsonl`, log lines, the bar."""

import logging
from contextlib import AbstractContextManager, nullcontext

from vlal_dist.errors import VlalError
from vlal_dist.method.metrics import Evaluation
from vlal_dist.observability.metrics import TERM_KINDS
from vlal_dist.observability.progress import Progress
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
    )
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
    run.metrics.validation(split=run.settings.validation_split, mean_ap=by_group)
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
