"""`python -m vlal_dist.report`: one self-contained HTML page about a run.

Reads what train and evaluate left in the run's root, and the dataset; never the model.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, open_split
from vlal_dist.data.format.photo_groups import image_numbers
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.evaluation.bootstrap import REPLICATES, group_intervals
from vlal_dist.evaluation.dense_labels import read_dense_labels
from vlal_dist.evaluation.predictions import Predictions, load_predictions
from vlal_dist.evaluation.results import read_attributes, result_folder
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.reporting.fig4 import Example, build_example, choose_rows, tally
from vlal_dist.reporting.page import Page, render_page
from vlal_dist.reporting.pr_curves import draw_pr_curves
from vlal_dist.reporting.result_table import (
    Row,
    read_tables,
    result_columns,
    result_notes,
    result_row,
)
from vlal_dist.reporting.run_card import ignored_sentence, read_object, run_card
from vlal_dist.reporting.selective_sections import selective_sections
from vlal_dist.reporting.training_curves import Line, read_metrics, training_curves
from vlal_dist.storage.store import Store, open_store, read_url

PURPOSE = """
Write RUN/report.html: run card, result as in Table 1 with class counts and intervals, a table of
all attributes, precision-recall curves, the paper's Fig. 4 grid, training curves, what the loss
ignored (needs paths.merged), likelihood against annotation. Run evaluate first, with the same
--evaluation.split and --evaluation.predictor. The constant and the zero-shot CLIP predictor of the
same run appear when they were evaluated.
"""

PAGE = "report.html"


@dataclass(frozen=True)
class Inputs:
    """What the page is made of, read and found to belong together.

    Attributes:
        store: the run's root.
        folder: of the evaluation, below it.
        result: its `result.json`.
        dataset, split: what was evaluated.
        predictions: of the split.
        truth: complete labels int8 [N, A], if known.
        config_text: the run's resolved configuration, or empty.
        run_config: the same as values.
        lines: of `metrics.jsonl`.
    """

    store: Store
    folder: str
    result: dict[str, Any]
    dataset: Dataset
    split: Split
    predictions: Predictions
    truth: npt.NDArray[np.int8] | None
    config_text: str
    run_config: dict[str, Any]
    lines: list[Line]


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Gather, render, write; returns the closing counts."""
    inputs = _read(config)
    page = _build(config, inputs)
    data = render_page(page)
    inputs.store.replace(PAGE, data)
    return {
        "page": f"{config.paths.run}/{PAGE}",
        "bytes": len(data),
        "rows": len(page.rows),
        "attributes": len(page.attributes),
        "examples": len(page.examples),
        "mAP": inputs.result["groups"][0]["mAP"],
    }


def _read(config: Config) -> Inputs:
    settings = config.evaluation
    store = open_store(config.paths.run)
    dataset = open_dataset(config.paths.dataset, cache=Path(config.paths.cache))
    folder = result_folder(settings.split, settings.predictor)
    result = _read_result(store, folder)
    split = open_split(dataset, settings.split)
    predictions = _read_predictions(store, folder, result, dataset, split)
    truth = None
    if settings.truth is not None:
        truth = read_dense_labels(settings.truth, dataset, settings.split).label
    config_text = _read_text(store, "config.yaml")
    return Inputs(
        store=store,
        folder=folder,
        result=result,
        dataset=dataset,
        split=split,
        predictions=predictions,
        truth=truth,
        config_text=config_text,
        run_config=yaml.safe_load(config_text) or {},
        lines=_read_lines(store, "metrics.jsonl"),
    )


def _build(config: Config, inputs: Inputs) -> Page:
    settings, result, dataset = config.evaluation, inputs.result, inputs.dataset
    attributes = read_attributes(inputs.store, inputs.folder)
    score, label = inputs.predictions.score, inputs.predictions.label
    intervals, interval_note = _intervals(inputs.predictions, inputs.split, dataset)
    ignored, calibration = selective_sections(
        inputs.run_config,
        result,
        lambda: open_dataset(config.paths.merged, cache=Path(config.paths.cache)),
    )
    return Page(
        title=f"{result['name']} on {dataset.name}, {settings.split}",
        card=_card(inputs),
        config=inputs.config_text,
        digests=[
            ("dataset.json", dataset.digest),
            ("vocabulary", dataset.vocabulary.digest),
            ("feasible sets", dataset.feasible.digest),
        ],
        columns=result_columns(result, intervals),
        rows=_rows(config, inputs.store, result),
        interval_note=interval_note,
        notes=result_notes(result),
        excluded=result["excluded"],
        attributes=attributes,
        pr_curves=draw_pr_curves(attributes, score, label, count=settings.curves),
        curves=training_curves(inputs.lines),
        ignored_mean=ignored_sentence(inputs.lines, inputs.run_config.get("method", {})),
        ignored=ignored,
        calibration=calibration,
        examples=_examples(config, inputs),
        example_rule=_rule(config),
        tally=tally(inputs.predictions, inputs.truth, k=settings.example_attributes),
        top=settings.example_attributes,
        has_truth=inputs.truth is not None,
        experiments=[] if settings.experiments is None else read_tables(settings.experiments),
    )


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


def _read_lines(store: Store, key: str) -> list[Line]:
    return read_metrics(_read_text(store, key), where=f"{store.url}: {key}")


def _intervals(
    predictions: Predictions, split: Split, dataset: Dataset
) -> tuple[dict[str, tuple[float, float]], str]:
    """Intervals of the groups' mAP, and what they are in words."""
    image = image_numbers(split)
    photos = int(image.max(initial=-1)) + 1
    if photos < 2:
        return {}, "No interval: the split has a single photo."
    return group_intervals(predictions, image, dataset.vocabulary.groups()), (
        f"The interval says how far the mAP would move had other photos been drawn: the spread of "
        f"the central 95 % of {REPLICATES:,} Bayesian bootstrap replicates over the {photos:,} "
        "photos of the split, laid around the mAP. It does not say how far another training seed "
        "would move it."
    )


def _card(inputs: Inputs) -> list[tuple[str, str]]:
    store, key = inputs.store, "train.result.json"
    return run_card(
        inputs.result,
        inputs.dataset.manifest,
        run_config=inputs.run_config,
        lines=inputs.lines,
        starts=_read_lines(store, "starts.jsonl"),
        finished=read_object(_read_text(store, key), where=f"{store.url}: {key}"),
    )


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


def _examples(config: Config, inputs: Inputs) -> list[Example]:
    settings, predictions = config.evaluation, inputs.predictions
    reader = SampleReader(inputs.split)
    return [
        build_example(
            reader,
            predictions,
            int(position),
            vocabulary=inputs.dataset.vocabulary,
            truth=inputs.truth,
            k=settings.example_attributes,
        )
        for position in choose_rows(predictions, count=settings.examples, seed=config.training.seed)
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
    sections=("paths", "evaluation", "training", "observability"),
    flags=("json",),
    output=lambda config, flags: config.paths.run,
    work=work,
)


def main() -> int:
    """Run the program on the command line's arguments."""
    return run_program(PROGRAM, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
