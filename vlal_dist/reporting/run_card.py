"""Run card: what was trained, on what, how long; read from the files that train left.

`metrics.jsonl` has lines `{"kind": "validation", "epoch": .., "step": .., "mAP": ..}` and
`{"kind": "train", "step": .., "loss": ..}`; further keys and kinds are ignored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired

from typing_extensions import TypedDict

from vlal_dist.contents import Count, Finite, parse_json, parse_yaml
from vlal_dist.data.format.label_figures import LabelFigures
from vlal_dist.errors import DataError
from vlal_dist.evaluation.results import protocol_note, unannotated_of
from vlal_dist.method.feasible import largest_num_ignore
from vlal_dist.storage.store import Store

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

Line = Mapping[str, Any]
Card = list[tuple[str, str]]


class _Counts(TypedDict):
    seconds: NotRequired[Finite]


class _Finished(TypedDict):
    """`train.result.json`."""

    code: NotRequired[Count]
    counts: NotRequired[_Counts]


class _Start(TypedDict):
    """A line of `starts.jsonl`."""

    step: NotRequired[Count]


@dataclass(frozen=True)
class RunFiles:
    """What train left in a run's root; all empty without training (constant, CLIP).

    Attributes:
        config_text: `config.yaml`, the resolved configuration.
        config: the same as values.
        lines: of `metrics.jsonl`.
        starts: of `starts.jsonl`, a line per start.
        finished: `train.result.json`.
    """

    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[Line] = ()
    starts: Sequence[Line] = ()
    finished: Mapping[str, Any] = field(default_factory=dict)


def read_run_files(store: Store) -> RunFiles:
    """Read what train left in a run's root.

    Raises:
        DataError: a file is damaged.
    """

    def read(key: str) -> str:
        return store.read(key).decode(errors="replace") if store.exists(key) else ""

    config_text = read("config.yaml")
    config = parse_yaml(config_text, where=f"{store.url}: config.yaml") or {}
    if not isinstance(config, dict) or not all(isinstance(one, dict) for one in config.values()):
        raise DataError(f"{store.url}: config.yaml must hold sections; remove it, or train again")
    return RunFiles(
        config_text=config_text,
        config=config,
        lines=parse_lines(read("metrics.jsonl"), where=f"{store.url}: metrics.jsonl"),
        starts=parse_lines(read("starts.jsonl"), where=f"{store.url}: starts.jsonl", kind=_Start),
        finished=_parse(
            read("train.result.json") or "{}",
            where=f"{store.url}: train.result.json",
            kind=_Finished,
        ),
    )


def parse_lines(text: str, *, where: str, kind: Any = dict[str, Any]) -> list[Line]:
    """The objects of a JSON-lines file; a last line that a kill cut short is left out.

    Raises:
        DataError: another line is not a JSON object.
    """
    raw = [line for line in text.split("\n") if line.strip()]
    lines: list[Line] = []
    for number, line in enumerate(raw, start=1):
        try:
            lines.append(_parse(line, where=f"{where}, line {number}", kind=kind))
        except DataError:
            if number < len(raw):
                raise
    return lines


def series(lines: Sequence[Line], kind: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of one kind of line, by step; after a resume the later of two values.

    Lines without a finite step and value are left out.
    """
    found = {
        float(line["step"]): float(line[key])
        for line in lines
        if line.get("kind") == kind and _is_finite(line.get("step")) and _is_finite(line.get(key))
    }
    return sorted(found.items())


def run_card(
    result: Mapping[str, Any],
    manifest: Mapping[str, Any],
    run: RunFiles,
    *,
    trained: LabelFigures | None = None,
) -> Card:
    """(name, value) of the card, in order; what the run did not leave behind is left out.

    Args:
        result: `result.json`.
        manifest: `dataset.json` of what was evaluated.
        run: what train left.
        trained: density of its training split; None: it has none.
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
    if trained is not None:
        card.append(("Training labels", _density(trained)))
    for key in CARD_KEYS:
        section, name = key.split(".")
        if name in run.config.get(section, {}):
            card.append((key, str(run.config[section][name])))
    model = result["model"]
    if model is not None:
        card.append(("Best model", f"step {model['step']:,}, epoch {model['epoch']}"))
        value = model["validation_map"]
        shown = "undefined" if value is None else f"{100 * value:.2f} %"
        card.append(("Its validation mAP", shown))
    if note := protocol_note(unannotated_of(result)):
        card.append(("Protocol", note))
    steps = series(run.lines, "train", "loss")
    if steps:
        card.append(("Trained", f"{steps[-1][0]:,.0f} steps"))
        seen = samples_seen(run.lines)
        if seen is not None:
            card.append(("Samples seen", f"{seen:,} crops, repeated visits counted"))
        quarantined = series(run.lines, "train", "quarantined")
        if quarantined:
            card.append(("Quarantined", f"{quarantined[-1][1]:,.0f}"))
    for title, describe in (("Hardware", _hardware), ("Software", _software)):
        texts = dict.fromkeys(describe(line) for line in run.starts)  # a resume may change them
        if texts:
            card.append((title, "; then ".join(texts)))
    return card + _wall_time(run)


def _density(found: LabelFigures) -> str:
    """What NUM_IGNORE is chosen by (docs/your-data.md)."""
    return (
        f"{found.labels_per_sample:.1f} per crop; feasible sets of {found.mean_feasible:.1f} "
        f"attributes on average, {100 * found.unannotated:.1f} % of them unannotated; a NUM_IGNORE "
        f"of at most {largest_num_ignore(found.mean_feasible)} leaves three quarters to the loss"
    )


def samples_seen(lines: Sequence[Line]) -> int | None:
    """Visits of crops that reached an optimizer step, by the ledgers of `metrics.jsonl`.

    A ledger counts its epoch so far; the last of each epoch counts. None where no line has one.
    """
    counts = {
        line["epoch"]: int(line["ledger"]["count"])
        for line in lines
        if line.get("kind") == "train"
        and isinstance(line.get("ledger"), dict)
        and _is_finite(line["ledger"].get("count"))
        and _is_finite(line.get("epoch"))
    }
    return sum(counts.values()) if counts else None


def _parse(text: str, *, where: str, kind: Any) -> dict[str, Any]:
    remedy = "remove it, or train again"
    found: dict[str, Any] = parse_json(text, kind, where=where, remedy=remedy, nan=True)
    return found


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _hardware(start: Line) -> str:
    ranks, threads, cores = (
        f"{start.get(name)} {name[:-1] if start.get(name) == 1 else name}"
        for name in ("ranks", "threads", "cores")
    )
    return f"{start.get('device')}, {ranks} with {threads}; rank 0's machine has {cores}"


def _software(start: Line) -> str:
    commit = f" ({start['commit']})" if start.get("commit") else ""
    return (
        f"vlal_dist {start.get('version')}{commit}, torch {start.get('torch')}, "
        f"loss by {start.get('kernel')}"
    )


def _wall_time(run: RunFiles) -> Card:
    """Time of the program that ended the run; earlier starts recorded none."""
    if not run.finished:
        return []
    seconds = run.finished.get("counts", {}).get("seconds")
    if seconds is None:
        code = run.finished.get("code")
        return [("Wall time", f"not known: the last start ended with code {code}")]
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    if len(run.starts) > 1:
        last = run.starts[-1].get("step")
        text += f", of the last of {len(run.starts)} starts (from step {last:,})"
    return [("Wall time of training", text)]
