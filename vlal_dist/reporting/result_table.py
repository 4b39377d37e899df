"""Result tables of the report: the groups of Table 1, and tables of experiments.

Read from `ROOT/TABLE/TABLE.json` for table1, table2 and ablations: `title`, `lead`, `head`,
`reference`, `columns` (name, count), `rows` (variant, label, cells, groups), `notes`. Nothing of
them but text and numbers reaches the page.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import markupsafe

from vlal_dist.errors import DataError
from vlal_dist.evaluation.results import headline_metrics, percent
from vlal_dist.reporting.interval_chart import Point, draw_interval_curve
from vlal_dist.storage.store import open_store


@dataclass(frozen=True)
class Column:
    """A figure of the result table.

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
    """One evaluation.

    Attributes:
        name: what was evaluated.
        note: what sets it apart (split, dataset), in small print.
        cells: one text per column, percent.
        main: the run that the page is about.
    """

    name: str
    note: str
    cells: list[str]
    main: bool = False


def result_columns(
    result: dict[str, Any], intervals: Mapping[str, tuple[float, float]]
) -> list[Column]:
    """The groups of Table 1 by `mAP`, then the VAW evaluator's overall metrics.

    Args:
        result: `result.json` of the page's own run.
        intervals: of the groups' mAP, shares of 1; NaN or absent: none.
    """
    columns = [
        Column(
            group["name"],
            f"{group['num_classes']} of {group['num_attributes']}",
            _interval(intervals.get(group["name"])),
        )
        for group in result["groups"]
    ]
    overall = result["groups"][0]
    columns += [
        Column(name, str(overall["num_classes_vaw"]))
        for name in headline_metrics(result["settings"]["top_k"])
    ]
    if result["truth"] is not None:
        whole = result["truth"]["groups"][0]
        columns.append(Column("mAP, complete labels", str(whole["num_classes"])))
    return columns


def result_row(result: Any, main: dict[str, Any], *, where: str, is_main: bool = False) -> Row:
    """One row under the columns of `main`; what differs from `main` is said in the note.

    Raises:
        DataError: `result` is no result of ours.
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
        return Row(name=result["name"], note=", ".join(note), cells=cells, main=is_main)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{where} is no result.json of this version ({error!r}); evaluate that run again"
        ) from None


def result_notes(result: dict[str, Any]) -> list[str]:
    """Remarks below the table."""
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


def _interval(ends: tuple[float, float] | None) -> str:
    """`[36.12, 41.90]`; empty where there is none."""
    if ends is None or ends[0] != ends[0]:
        return ""
    return f"[{percent(ends[0])}, {percent(ends[1])}]"


SHOWN = ("table1", "table2", "ablations")


@dataclass(frozen=True)
class ExperimentTable:
    """One table.

    Attributes:
        title, lead: heading and the line below it.
        head: heading of the rows' names.
        columns, rows: the table; a row has a cell per column.
        notes: what is what, below it.
        curve: SVG of mAP by row (Table 2), or empty.
    """

    title: str
    lead: str
    head: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    curve: markupsafe.Markup


def read_tables(url: str) -> list[ExperimentTable]:
    """The tables of a root of experiments that are there.

    Raises:
        DataError: none is there, or one is none of this version.
    """
    store = open_store(url)
    keys = [f"{name}/{name}.json" for name in SHOWN]
    there = [key for key in keys if store.exists(key)]
    if not there:
        raise DataError(
            f"evaluation.experiments: {store.url} holds no {', no '.join(keys)}; run "
            "python -m vlal_dist.experiments, or name its root"
        )
    return [parse_table(store.read(key), where=f"{store.url}/{key}") for key in there]


def parse_table(data: bytes, *, where: str) -> ExperimentTable:
    """One table of its JSON.

    Raises:
        DataError: another content; `where` is named.
    """
    try:
        values = json.loads(data)
        reference = values["reference"]
        return ExperimentTable(
            title=str(values["title"]),
            lead=str(values["lead"]),
            head=str(values["head"]),
            columns=[Column(str(one["name"]), str(one["count"])) for one in values["columns"]],
            rows=[
                Row(
                    str(one["label"]),
                    "",
                    [str(cell) for cell in one["cells"]],
                    main=one["variant"] == reference,
                )
                for one in values["rows"]
            ],
            notes=[str(note) for note in values["notes"]],
            curve=markupsafe.Markup(_curve(values) if values["table"] == "table2" else ""),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} is no table of this version ({error!r}); run vlal_dist.experiments again"
        ) from None


def _curve(values: dict[str, Any]) -> str:
    """mAP by NUM_IGNORE; rows without a finished run are left out. All texts are escaped."""
    points = []
    for row in values["rows"]:
        own = row["groups"].get("overall")
        if own is None or own["low"] is None or own["high"] is None:
            continue
        label = str(row["label"])
        points.append(
            Point(
                x=float(label) if label.isdecimal() else None,
                label=label,
                value=100 * float(own["mean"]),
                low=100 * float(own["low"]),
                high=100 * float(own["high"]),
                marked=row["variant"] == values["reference"],
            )
        )
    return draw_interval_curve(
        points,
        title=f"Test mAP by NUM_IGNORE, {values['dataset']}",
        x_title="NUM_IGNORE: attributes left out of the loss per visit",
        y_title="test mAP, % (95 % over photos)",
        marked_title="as configured",
    )
