"""Result tables of the page: the groups of Table 1, and the tables of experiments.

Tables of experiments are read from `ROOT/TABLE/TABLE.json`, for table1, table2 and ablations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlal_dist.contents import parse_json
from vlal_dist.errors import DataError
from vlal_dist.evaluation.results import (
    headline_metrics,
    percent,
    protocol_note,
    read_result,
    unannotated_of,
)
from vlal_dist.reporting.charts import IntervalChart, IntervalPoint
from vlal_dist.storage.store import Store, open_store

EXPERIMENT_TABLES = ("table1", "table2", "ablations")


@dataclass(frozen=True)
class Column:
    """A figure of a table.

    Attributes:
        name: group, or metric.
        count: how many attributes count in it.
        interval: the 95 % interval of the page's own run, or empty.
    """

    name: str
    count: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """One evaluation, or one row of an experiment.

    Attributes:
        name: what was evaluated.
        cells: one text per column.
        note: what sets it apart (split, dataset), in small print.
        main: the run that the page is about, or the reference.
    """

    name: str
    cells: list[str]
    note: str = ""
    main: bool = False


@dataclass(frozen=True)
class ExperimentTable:
    """One table of experiments.

    Attributes:
        title, lead: heading and the line below it.
        head: heading of the rows' names.
        columns, rows: the table; a row has a cell per column.
        notes: explanations below the table.
        chart: mAP by row (Table 2), or None.
    """

    title: str
    lead: str
    head: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    chart: IntervalChart | None


def result_columns(
    result: dict[str, Any], intervals: Mapping[str, tuple[float, float]]
) -> list[Column]:
    """The groups of Table 1 by `mAP`, then the VAW evaluator's overall metrics.

    Args:
        result: `result.json` of the page's own run.
        intervals: of the groups' mAP, shares of 1; NaN or absent: none.
    """
    columns = []
    for group in result["groups"]:
        low, high = intervals.get(group["name"], (float("nan"), float("nan")))
        interval = f"[{percent(low)}, {percent(high)}]" if low == low else ""
        count = f"{group['num_classes']} of {group['num_attributes']}"
        columns.append(Column(group["name"], count, interval))
    count = str(result["groups"][0]["num_classes_vaw"])
    columns += [Column(name, count) for name in headline_metrics(result["settings"]["top_k"])]
    if result["truth"] is not None:
        whole = result["truth"]["groups"][0]
        columns.append(Column("mAP, complete labels", str(whole["num_classes"])))
    return columns


def result_row(result: Any, main: dict[str, Any], *, where: str, is_main: bool = False) -> Row:
    """One row under the columns of `main`; the note says what differs from `main`.

    Raises:
        DataError: `result` is not a `result.json` of this version.
    """
    try:
        groups = {group["name"]: group for group in result["groups"]}
        cells = []
        for group in main["groups"]:
            found = groups.get(group["name"])
            cell = percent(None if found is None else found["mAP"])
            if found is not None and found["num_classes"] != group["num_classes"]:
                cell += f" ({found['num_classes']})"
            cells.append(cell)
        overall = result["groups"][0]
        cells += [
            percent(overall.get(name)) for name in headline_metrics(main["settings"]["top_k"])
        ]
        if main["truth"] is not None:
            truth = result["truth"]
            cells.append(percent(None if truth is None else truth["groups"][0]["mAP"]))
        note = [f"{result['num_samples']} crops"]
        if result["split"] != main["split"]:
            note.append(f"split {result['split']}")
        if result["dataset"]["digest"] != main["dataset"]["digest"]:
            note.append(f"another dataset: {result['dataset']['name']}")
        unannotated = unannotated_of(result)
        if unannotated == "negative" or unannotated != unannotated_of(main):
            note.append(protocol_note(unannotated) or "unannotated pairs excluded")
        return Row(result["name"], cells, note=", ".join(note), main=is_main)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{where} is not a result.json of this version ({error!r}); evaluate that run again"
        ) from None


@dataclass(frozen=True)
class OtherDataset:
    """Results of a run on another dataset or split than its page is about.

    Attributes:
        title: names dataset and split.
        digest: of the dataset.
        columns, rows: as those of the page's own result.
    """

    title: str
    digest: str
    columns: list[Column]
    rows: list[Row]


def other_datasets(store: Store, main: dict[str, Any]) -> list[OtherDataset]:
    """The evaluations of a run on other datasets than that of `main`.

    Args:
        store: the run root.
        main: `result.json` of the page.

    Raises:
        DataError: a result is damaged.
    """
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for key in sorted(store.list_keys("evaluation/")):
        if not key.endswith("/result.json"):
            continue
        result = read_result(store.read(key), where=f"{store.url}: {key}")
        dataset = result["dataset"]
        if dataset["digest"] != main["dataset"]["digest"]:
            place = (dataset["name"], dataset["digest"], result["split"])
            found.setdefault(place, []).append(result)
    return [
        OtherDataset(
            title=f"{name}, {split}",
            digest=digest,
            columns=result_columns(results[0], {}),
            rows=[result_row(one, results[0], where=f"evaluation of {name}") for one in results],
        )
        for (name, digest, split), results in found.items()
    ]


def read_tables(url: str) -> list[ExperimentTable]:
    """The tables below a root of experiments.

    Raises:
        DataError: there is none, or one is of another version.
    """
    store = open_store(url)
    keys = [f"{name}/{name}.json" for name in EXPERIMENT_TABLES]
    present = [key for key in keys if store.exists(key)]
    if not present:
        raise DataError(
            f"evaluation.experiments: {store.url} holds no {', no '.join(keys)}; run "
            "vlal experiments, or name its root"
        )
    return [parse_table(store.read(key), where=f"{store.url}/{key}") for key in present]


def parse_table(data: bytes, *, where: str) -> ExperimentTable:
    """A table from the bytes of its `TABLE.json`; names, labels and notes are text, never markup.

    Raises:
        DataError: other content; `where` is named.
    """
    try:
        remedy = "run vlal_dist.experiments again"
        return experiment_table(parse_json(data, dict[str, Any], where=where, remedy=remedy))
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} is not a table of this version ({error!r}); run vlal_dist.experiments again"
        ) from None


def experiment_table(
    values: Mapping[str, Any], singles: Mapping[str, Sequence[float]] | None = None
) -> ExperimentTable:
    """A table from the content of its `TABLE.json`.

    Args:
        values: `table`, `title`, `lead`, `head`, `dataset`, `reference`, `columns` (name, count),
            `rows` (variant, label, cells, groups), `notes`.
        singles: variant -> mAP of each seed in percent, shown in the chart; None: not known.
    """
    rows = values["rows"]
    points = []
    for row in rows if values["table"] == "table2" else []:
        own, label = row["groups"].get("overall"), row["label"]
        if own is None or own["low"] is None or own["high"] is None:
            continue
        points.append(
            IntervalPoint(
                x=float(label) if label.isdecimal() else None,
                label="ALL" if label == "all" else label,
                value=100 * own["mean"],
                low=100 * own["low"],
                high=100 * own["high"],
                singles=tuple(singles[row["variant"]]) if singles else (),
                marked=row["variant"] == values["reference"],
            )
        )
    title = f"Test mAP by NUM_IGNORE, {values['dataset']}"
    return ExperimentTable(
        title=values["title"],
        lead=values["lead"],
        head=values["head"],
        columns=[Column(one["name"], one["count"]) for one in values["columns"]],
        rows=[
            Row(row["label"], row["cells"], main=row["variant"] == values["reference"])
            for row in rows
        ],
        notes=values["notes"],
        chart=IntervalChart(title, points) if points else None,
    )
