"""`python -m vlal_dist.report`: one self-contained HTML page about a run.

Reads what train and evaluate left in the run's root, and the dataset; never the model.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from vlal_dist.config.config import Config
from vlal_dist.data.dataset import Dataset, Split, open_dataset, open_split
from vlal_dist.data.rows import RowReader
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.evaluation.curves import Curve, Line, draw_curve, read_metrics, series
from vlal_dist.evaluation.examples import Example, build_example, choose_rows, tally
from vlal_dist.evaluation.page import Page, Row, render_page, result_columns, result_row
from vlal_dist.evaluation.predictions import Predictions, load_predictions
from vlal_dist.evaluation.results import decode_attributes, result_folder
from vlal_dist.evaluation.truth import read_truth
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.storage.store import Store, open_store, read_url

PURPOSE = """
Write RUN/report.html: run card, result row as in Table 1 with class counts, training curves, the
paper's Fig. 4 grid and a table of all attributes. Run evaluate first, with the same
--evaluation.split and --evaluation.predictor. Rows of the constant and the zero-shot CLIP
predictor of the same run appear when they were evaluated.
"""

PAGE = "report.html"
CARD_KEYS = (
    "method.profile",
    "method.loss",
    "method.num_ignore",
    "method.draw_over",
    "method.draw",
    "method.draw_weights",
    "model.depth",
    "data.image_size",
    "training.batch_size",
    "training.epochs",
    "training.seed",
)


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Gather, render, write; returns the closing counts."""
    settings = config.evaluation
    store = open_store(config.paths.run)
    dataset = open_dataset(config.paths.dataset, cache=Path(config.paths.cache))
    folder = result_folder(settings.split, settings.predictor)
    result = _read_result(store, folder)
    split = open_split(dataset, settings.split)
    predictions = _read_predictions(store, folder, result, dataset, split)
    truth = None
    if settings.truth is not None:
        truth = read_truth(settings.truth, dataset, settings.split).label
    run_config = _read_text(store, "config.yaml")
    lines = read_metrics(_read_text(store, "metrics.jsonl"), where=f"{store.url}: metrics.jsonl")
    page = Page(
        title=f"{result['name']} on {dataset.name}, {settings.split}",
        card=_card(result, dataset, run_config, lines),
        config=run_config,
        columns=result_columns(result),
        rows=_rows(config, store, result),
        notes=_notes(result),
        excluded=result["excluded"],
        curves=_curves(lines),
        ignored=_ignored(lines, run_config),
        attributes=_attributes(store, folder),
        examples=_examples(config, dataset, split, predictions, truth),
        example_rule=_rule(config),
        tally=tally(predictions, truth, k=settings.example_attributes),
        top=settings.example_attributes,
        has_truth=truth is not None,
    )
    data = render_page(page)
    store.replace(PAGE, data)
    return {
        "page": f"{config.paths.run}/{PAGE}",
        "bytes": len(data),
        "rows": len(page.rows),
        "attributes": len(page.attributes),
        "examples": len(page.examples),
        "mAP": result["groups"][0]["mAP"],
    }


def _read_result(store: Store, folder: str) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(store.read(f"{folder}/result.json"))
        return result
    except NotFoundError:
        raise DataError(
            f"{store.url} holds no {folder}/result.json; run python -m vlal_dist.evaluate with "
            "the same --paths.run, --evaluation.split and --evaluation.predictor"
        ) from None
    except ValueError as error:
        raise DataError(f"{store.url}: {folder}/result.json is damaged ({error})") from None


def _read_predictions(
    store: Store, folder: str, result: dict[str, Any], dataset: Dataset, split: Split
) -> Predictions:
    """The predictions, once it is certain that they are of this dataset."""
    found = result["dataset"]["digest"]
    if found != dataset.digest:
        raise DataError(
            f"{store.url}: {folder} was evaluated on a dataset with digest {found}, {dataset.url} "
            f"has {dataset.digest}; point paths.dataset at the former, or evaluate again"
        )
    predictions = load_predictions(store, f"{folder}/predictions.safetensors")
    if not np.array_equal(split.index.uid, predictions.uid):
        raise DataError(
            f"{store.url}: {folder}/predictions.safetensors names other samples than "
            f"{dataset.url}; evaluate again"
        )
    return predictions


def _read_text(store: Store, key: str) -> str:
    """A text of the run, empty where there is none (no training here: constant, CLIP)."""
    return store.read(key).decode() if store.exists(key) else ""


def _card(
    result: dict[str, Any], dataset: Dataset, run_config: str, lines: list[Line]
) -> list[tuple[str, str]]:
    counts = dataset.manifest["splits"]
    card = [
        ("Dataset", dataset.name),
        ("Dataset digest", dataset.digest[:16]),
        ("Crops", ", ".join(f"{name} {entry['samples']:,}" for name, entry in counts.items())),
        ("Rejected", f"{sum(entry.get('rejected', 0) for entry in counts.values()):,}"),
        ("Evaluated", f"{result['split']}: {result['num_samples']:,} crops"),
        ("Labels", f"{result['num_positive']:,} positive, {result['num_negative']:,} negative"),
    ]
    values = yaml.safe_load(run_config) or {}
    for key in CARD_KEYS:
        section, name = key.split(".")
        if name in values.get(section, {}):
            card.append((key, str(values[section][name])))
    model = result["model"]
    if model is not None:
        card.append(("Best model", f"step {model['step']:,}, epoch {model['epoch']}"))
        card.append(("Its validation mAP", f"{100 * model['validation_map']:.2f} %"))
    steps = [int(step) for step, _ in series(lines, "train", "loss")]
    if steps:
        batch = values.get("training", {}).get("batch_size")
        each = "" if batch is None else f" of {batch} crops"
        card.append(("Trained", f"{steps[-1]:,} steps{each}"))
    return card


def _rows(config: Config, store: Store, main: dict[str, Any]) -> list[Row]:
    """The run's own row, then constant and CLIP of the same run, then `evaluation.compare`."""
    split, own = config.evaluation.split, config.evaluation.predictor
    rows = [result_row(main, main, where="this run", is_main=True)]
    for predictor in ("model", "constant", "clip"):
        folder = result_folder(split, predictor)
        if predictor != own and store.exists(f"{folder}/result.json"):
            rows.append(result_row(_read_result(store, folder), main, where=folder))
    for url in config.evaluation.compare:
        rows.append(result_row(_read_compared(url), main, where=url))
    return rows


def _read_compared(url: str) -> object:
    try:
        return json.loads(read_url(url))
    except (NotFoundError, ValueError) as error:
        raise DataError(
            f"evaluation.compare: {url} cannot be read ({error}); name result.json files that "
            "evaluate wrote"
        ) from None


def _notes(result: dict[str, Any]) -> list[str]:
    notes = []
    if result["predictor"] == "clip":
        notes.append("CLIP similarities rank crops; they are no probabilities, so mA says little.")
    overall = result["groups"][0]
    if (overall["mA"] or 0) < 0:
        notes.append(
            "-: the VAW evaluator leaves a metric undefined where one attribute of the group has "
            "no annotated positive (or, for mA, no negative) in the split."
        )
    unknown = [] if result["truth"] is None else result["truth"]["unknown_names"]
    if unknown:
        notes.append(
            "Names in the complete labels that the vocabulary lacks, left out: "
            + ", ".join(unknown)
        )
    return notes


def _curves(lines: list[Line]) -> list[Curve]:
    drawn = (
        draw_curve(series(lines, "validation", "mAP"), title="Validation mAP, %", percent=True),
        draw_curve(series(lines, "train", "loss"), title="Training loss", percent=False),
    )
    return [curve for curve in drawn if curve is not None]


def _ignored(lines: list[Line], run_config: str) -> str:
    """NUM_IGNORE beside how many unannotated attributes were really left out per crop."""
    values = [value for _, value in series(lines, "train", "ignored_effective")]
    if not values:
        return ""
    method = (yaml.safe_load(run_config) or {}).get("method", {})
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


def _attributes(store: Store, folder: str) -> list[dict[str, Any]]:
    key = f"{folder}/attributes.parquet"
    lines = decode_attributes(store.read(key), where=f"{store.url}: {key}")
    for line in lines:
        labelled = line["num_positive"] + line["num_negative"]
        line["baseline"] = line["num_positive"] / labelled if labelled else None
    return lines


def _examples(
    config: Config,
    dataset: Dataset,
    split: Split,
    predictions: Predictions,
    truth: npt.NDArray[np.int8] | None,
) -> list[Example]:
    settings = config.evaluation
    chosen = choose_rows(predictions, count=settings.examples, seed=config.training.seed)
    reader = RowReader(split)
    return [
        build_example(
            reader,
            predictions,
            int(position),
            vocabulary=dataset.vocabulary,
            truth=truth,
            k=settings.example_attributes,
        )
        for position in chosen
    ]


def _rule(config: Config) -> str:
    return (
        f"Not hand-picked: of the crops with at least one attribute annotated present, the first "
        f"{config.evaluation.examples} in the order of sha256(seed:uid), seed "
        f"{config.training.seed}, a rule fixed before any score was known."
    )


PROGRAM = Program(
    name="report",
    usage="python -m vlal_dist.report",
    purpose=PURPOSE,
    sections=("paths", "evaluation", "training"),
    flags=("json",),
    output=lambda config, flags: config.paths.run,
    work=work,
)


def main() -> int:
    """Run the program on the command line's arguments."""
    return run_program(PROGRAM, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
