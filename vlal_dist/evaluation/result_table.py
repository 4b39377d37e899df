"""The result table of the page: the groups of Table 1, this run beside others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlal_dist.errors import DataError
from vlal_dist.evaluation.results import headline_metrics, percent


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
