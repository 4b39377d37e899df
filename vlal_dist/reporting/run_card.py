"""The run card: what was trained, on what, how long; read from what train left behind."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlal_dist.errors import DataError
from vlal_dist.reporting.training_curves import Line, series

CARD_KEYS = (
    "method.profile",
    "method.loss",
    "method.num_ignore",
    "method.draw",
    "method.draw_weights",
    "method.draw_over",
    "model.depth",
    "model.width",
    "data.image_size",
    "training.batch_size",
    "training.epochs",
    "training.precision",
    "training.seed",
)

Card = list[tuple[str, str]]


def run_card(
    result: Mapping[str, Any],
    manifest: Mapping[str, Any],
    *,
    run_config: Mapping[str, Any],
    lines: Sequence[Line],
    starts: Sequence[Line],
    finished: Mapping[str, Any],
) -> Card:
    """(name, value) of the card, in order; what the run did not leave behind is not mentioned.

    Args:
        result: `result.json`.
        manifest: `dataset.json` of what was evaluated.
        run_config: the run's resolved configuration; empty without training.
        lines: of `metrics.jsonl`.
        starts: of `starts.jsonl`.
        finished: `train.result.json`; empty without.
    """
    splits = manifest["splits"]
    card = [
        ("Dataset", str(result["dataset"]["name"])),
        ("Dataset digest", str(result["dataset"]["digest"])[:12]),
        ("Crops", ", ".join(f"{name} {entry['samples']:,}" for name, entry in splits.items())),
        ("Rejected at packing", f"{sum(entry.get('rejected', 0) for entry in splits.values()):,}"),
        ("Evaluated", f"{result['split']}: {result['num_samples']:,} crops"),
        ("Labels", f"{result['num_positive']:,} positive, {result['num_negative']:,} negative"),
    ]
    for key in CARD_KEYS:
        section, name = key.split(".")
        if name in run_config.get(section, {}):
            card.append((key, str(run_config[section][name])))
    model = result["model"]
    if model is not None:
        card.append(("Best model", f"step {model['step']:,}, epoch {model['epoch']}"))
        card.append(("Its validation mAP", f"{100 * model['validation_map']:.2f} %"))
    return card + _trained(lines) + _ran_on(starts) + _wall_time(finished, starts)


def samples_seen(lines: Sequence[Line]) -> int | None:
    """Visits of crops that reached an optimizer step, by the ledgers of `metrics.jsonl`.

    A ledger counts its epoch so far; the last of each epoch counts. None where no line has one.
    """
    counts: dict[int, int] = {}
    for line in lines:
        ledger = line.get("ledger")
        if line.get("kind") == "train" and isinstance(ledger, dict):
            counts[int(str(line["epoch"]))] = int(ledger["count"])
    return sum(counts.values()) if counts else None


def ignored_sentence(lines: Sequence[Line], method: Mapping[str, Any]) -> str:
    """NUM_IGNORE beside how many unannotated attributes were really left out per crop.

    Args:
        lines: of `metrics.jsonl`.
        method: the section of the run's configuration.
    """
    values = [value for _, value in series(lines, "train", "ignored_effective")]
    if not values:
        return ""
    mean = sum(values) / len(values)
    left_out = (
        f"{mean:.2f} unannotated attributes per crop and visit were left out of the loss "
        "(mean over the logged training steps)"
    )
    if method.get("loss", "selective") != "selective":
        return f"By the rule of {method['loss']}, {left_out}."
    return (
        f"NUM_IGNORE is {method.get('num_ignore', 'unknown')}; {left_out}. The two differ where "
        "a feasible set is smaller than NUM_IGNORE, and where a draw meets an annotated attribute."
    )


def read_object(text: str, *, where: str) -> dict[str, Any]:
    """A JSON object, or an empty one of an empty text.

    Raises:
        DataError: it is something else.
    """
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error}); remove it, or train again") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is no JSON object; remove it, or train again")
    return value


def _trained(lines: Sequence[Line]) -> Card:
    steps = [int(step) for step, _ in series(lines, "train", "loss")]
    if not steps:
        return []
    card = [("Trained", f"{steps[-1]:,} steps")]
    seen = samples_seen(lines)
    if seen is not None:
        card.append(("Samples seen", f"{seen:,} crops, repeated visits counted"))
    quarantined = series(lines, "train", "quarantined")
    if quarantined:
        card.append(("Quarantined", f"{quarantined[-1][1]:,.0f}"))
    return card


def _ran_on(starts: Sequence[Line]) -> Card:
    """Hardware and software; each different line once, where a run was resumed."""
    card: Card = []
    for title, describe in (("Hardware", _hardware), ("Software", _software)):
        texts = dict.fromkeys(describe(line) for line in starts)
        if texts:
            card.append((title, "; then ".join(texts)))
    return card


def _hardware(line: Line) -> str:
    ranks, threads, cores = (
        f"{line.get(name)} {name[:-1] if line.get(name) == 1 else name}"
        for name in ("ranks", "threads", "cores")
    )
    return f"{line.get('device')}, {ranks} with {threads}; rank 0's machine has {cores}"


def _software(line: Line) -> str:
    commit = line.get("commit")
    known = f" ({commit})" if commit else ""
    return (
        f"vlal_dist {line.get('version')}{known}, torch {line.get('torch')}, "
        f"loss by {line.get('kernel')}"
    )


def _wall_time(finished: Mapping[str, Any], starts: Sequence[Line]) -> Card:
    """Seconds of the program that ended the run; earlier starts left no record of theirs."""
    if not finished:
        return []
    seconds = finished.get("counts", {}).get("seconds")
    if seconds is None:
        return [("Wall time", f"not known: the last start ended with code {finished.get('code')}")]
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    if len(starts) > 1:
        text += f", of the last of {len(starts)} starts (from step {starts[-1].get('step'):,})"
    return [("Wall time of training", text)]
