"""HTML report of a run, and pages of experiment tables: self-contained files that open from disk.

All texts pass jinja2's autoescape. A page's Content-Security-Policy allows its own style and script
by their hashes, images as data URIs, and nothing else.
"""

import base64
import hashlib
import re
import statistics
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from vlal_dist.config.sections import EvaluationConfig, PathsConfig
from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, open_split
from vlal_dist.data.format.label_figures import LabelFigures, label_figures
from vlal_dist.data.format.photo_groups import image_numbers
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.evaluation.bootstrap import REPLICATES, group_intervals
from vlal_dist.evaluation.dense_labels import read_dense_labels
from vlal_dist.evaluation.predictions import Predictions, as_counted, load_predictions
from vlal_dist.evaluation.results import (
    find_folder,
    percent,
    protocol_note,
    read_attributes,
    read_result,
    unannotated_of,
)
from vlal_dist.reporting.charts import IntervalChart, LineChart, draw_curve, draw_pr_curves
from vlal_dist.reporting.fig4 import build_example, choose_rows, tally
from vlal_dist.reporting.result_table import (
    ExperimentTable,
    Row,
    other_datasets,
    read_tables,
    result_columns,
    result_row,
)
from vlal_dist.reporting.run_card import RunFiles, read_run_files, run_card, series
from vlal_dist.reporting.selective_sections import selective_sections
from vlal_dist.storage.store import Store, open_store, read_url

MAX_PAGE_BYTES = 10_000_000

Context = dict[str, Any]
"""Values of the template's names: texts, numbers, and the sections of the other modules."""


def build_page(
    config: EvaluationConfig,
    paths: PathsConfig,
    *,
    seed: int,
    warnings: Sequence[tuple[str, Sequence[str]]] = (),
) -> Context:
    """Read a run and its evaluation, and collect all that the template `page.html` shows.

    Args:
        config: evaluated split and predictor, and the selection of content.
        paths: `run`, `dataset`, `merged` and `cache` are read.
        seed: decides which crops are shown.
        warnings: title of a stage, and its remarks.

    Raises:
        DataError: no evaluation there, or one of another dataset; a damaged file.
    """
    store = open_store(paths.run)
    dataset = open_dataset(paths.dataset, cache=Path(paths.cache))
    split = open_split(dataset, config.split)
    folder = find_folder(store, dataset, split=config.split, predictor=config.predictor)
    result = _read_result(store, folder)
    predictions = _read_predictions(store, folder, result, dataset, split)
    truth = None
    if config.truth is not None:
        truth = read_dense_labels(config.truth, dataset, config.split).label
    attributes = read_attributes(store, folder)
    run = read_run_files(store)
    photo = image_numbers(split)
    photos = int(photo.max(initial=-1)) + 1
    groups = dataset.vocabulary.groups()
    unannotated = unannotated_of(result)
    counted = as_counted(predictions, unannotated)
    intervals = group_intervals(counted, photo, groups) if photos > 1 else {}
    left_out = [value for _, value in series(run.lines, "train", "ignored_effective")]
    ignored, calibration = selective_sections(run.config, result, paths)
    reader, top = SampleReader(split), config.example_attributes
    return {
        "title": f"{result['name']} on {dataset.name}, {config.split}",
        "config": config,
        "seed": seed,
        "warnings": warnings,
        "result": result,
        "run": run,
        "card": run_card(result, dataset.manifest, run, trained=_trained(run, dataset)),
        "digests": {
            "dataset.json": dataset.digest,
            "vocabulary": dataset.vocabulary.digest,
            "feasible sets": dataset.feasible.digest,
        },
        "note": protocol_note(unannotated),
        "columns": result_columns(result, intervals),
        "rows": list(_rows(config, store, result, dataset)),
        "others": other_datasets(store, result),
        "photos": photos,
        "replicates": REPLICATES,
        "attributes": attributes,
        "pr_curves": draw_pr_curves(attributes, counted.score, counted.label, count=config.curves),
        "curves": _curves(run),
        "ignored_mean": statistics.fmean(left_out) if left_out else None,
        "ignored": ignored,
        "calibration": calibration,
        "examples": [
            build_example(
                reader, predictions, position, vocabulary=dataset.vocabulary, truth=truth, k=top
            )
            for position in choose_rows(predictions, count=config.examples, seed=seed).tolist()
        ],
        "tally": tally(predictions, truth, k=top),
        "experiments": [] if config.experiments is None else read_tables(config.experiments),
    }


def render_page(context: Context) -> bytes:
    """The report as UTF-8 HTML, from all that `build_page` returns.

    Raises:
        ConfigError: it would exceed `MAX_PAGE_BYTES`.
    """
    style, script = _template("style.css"), _template("script.js")
    text = _render(
        "page.html",
        **context,
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )
    data = text.encode()
    if len(data) > MAX_PAGE_BYTES:
        raise ConfigError(
            f"the page has {len(data)} bytes, more than {MAX_PAGE_BYTES}; lower "
            "evaluation.examples, evaluation.curves or the number of files in evaluation.compare"
        )
    return data


def render_table(table: ExperimentTable) -> bytes:
    """A page of one experiment table as UTF-8 HTML."""
    (style,) = re.findall(r"<style>(.*?)</style>", _template("table.html"), flags=re.DOTALL)
    return _render("table.html", table=table, style_hash=_csp_hash(style)).encode()


def render_chart(chart: IntervalChart) -> str:
    """A chart of intervals as SVG text; colours are attributes, so it needs no style sheet."""
    return _render("intervals.svg", chart=chart) + "\n"


def _render(template: str, **values: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.tests["contains_dash"] = lambda cells: "-" in cells
    return environment.get_template(template).render(**values)


def _template(name: str) -> str:
    return resources.files("vlal_dist.reporting").joinpath("templates", name).read_text("utf-8")


def _csp_hash(content: str) -> str:
    """The name of a style or script in the Content-Security-Policy."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _trained(run: RunFiles, dataset: Dataset) -> LabelFigures | None:
    """Density of the labels of the training split; None: the dataset has none."""
    name = str(run.config.get("data", {}).get("train_split", "train"))
    return label_figures(dataset, name) if name in dataset.splits else None


def _curves(run: RunFiles) -> list[LineChart]:
    """Validation mAP and training loss over the steps, where there are any."""
    selected_by = protocol_note(run.config.get("evaluation", {}).get("unannotated", "excluded"))
    curves = (
        draw_curve(
            series(run.lines, "validation", "mAP"),
            title="Validation mAP, %" + (f" ({selected_by})" if selected_by else ""),
            is_share=True,
        ),
        draw_curve(series(run.lines, "train", "loss"), title="Training loss", is_share=False),
    )
    return [curve for curve in curves if curve is not None]


def _read_result(store: Store, folder: str) -> dict[str, Any]:
    try:
        data = store.read(f"{folder}/result.json")
    except NotFoundError:
        raise DataError(
            f"{store.url} holds no {folder}/result.json; run vlal evaluate with the "
            "same --paths.run, --paths.dataset, --evaluation.split and --evaluation.predictor"
        ) from None
    return read_result(data, where=f"{store.url}: {folder}/result.json")


def _read_predictions(
    store: Store, folder: str, result: dict[str, Any], dataset: Dataset, split: Split
) -> Predictions:
    """The predictions, checked to be of this dataset."""
    found = result["dataset"]["digest"]
    if found != dataset.digest:
        raise DataError(
            f"{store.url}: {folder} was evaluated on a dataset with digest {found}, {dataset.url} "
            f"has {dataset.digest}; point paths.dataset at the former, or evaluate again"
        )
    predictions = load_predictions(store, f"{folder}/predictions.safetensors")
    rows, width = np.arange(split.num_samples), len(dataset.vocabulary.attributes)
    same = np.array_equal(split.index.uid, predictions.uid) and predictions.score.shape[1] == width
    if not (same and np.array_equal(predictions.row, rows)):
        raise DataError(
            f"{store.url}: {folder}/predictions.safetensors names other samples or "
            f"attributes than {dataset.url}; evaluate again"
        )
    return predictions


def _rows(
    config: EvaluationConfig, store: Store, main: dict[str, Any], dataset: Dataset
) -> Iterator[Row]:
    """The run's own row, then constant and CLIP of the same run, then `evaluation.compare`."""
    yield result_row(main, main, where="this run", is_main=True)
    for predictor in ("model", "constant", "clip"):
        folder = find_folder(store, dataset, split=config.split, predictor=predictor)
        if predictor != config.predictor and store.exists(f"{folder}/result.json"):
            yield result_row(_read_result(store, folder), main, where=folder)
    for url in config.compare:
        remedy = "name result.json files that evaluate wrote"
        try:
            data = read_url(url)
        except NotFoundError as error:
            raise DataError(
                f"evaluation.compare: {url} cannot be read ({error}); {remedy}"
            ) from None
        compared = read_result(data, where=f"evaluation.compare: {url}", remedy=remedy)
        yield result_row(compared, main, where=url)
