"""A table's files: Parquet for machines, Markdown and HTML for people, JSON for other pages.

Shares are of 1 in Parquet and JSON, percent where people read them.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from vlal_dist.evaluation.interval_curve import Point, draw_interval_curve
from vlal_dist.evaluation.result_table import Row
from vlal_dist.evaluation.table_page import TablePage, render_table
from vlal_dist.experimenting.results import OVERALL
from vlal_dist.experimenting.summary import SummaryRow
from vlal_dist.experimenting.variants import ALL, REFERENCE
from vlal_dist.experimenting.wording import TITLES, Table, cells, columns, lead, notes
from vlal_dist.storage.store import open_store

RESULTS_SCHEMA = pa.schema(
    [
        ("variant", pa.string()),
        ("label", pa.string()),
        ("seed", pa.int64()),
        ("group", pa.string()),
        ("num_classes", pa.int64()),
        ("mAP", pa.float64()),
        ("validation_map", pa.float64()),
        ("best_epoch", pa.int64()),
        ("seconds", pa.float64()),
    ]
)
"""A line per finished run and group."""

SUMMARY_SCHEMA = pa.schema(
    [
        ("variant", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("seeds", pa.int64()),
        ("failed", pa.int64()),
        ("mean", pa.float64()),
        ("sd", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("difference", pa.float64()),
        ("difference_sd", pa.float64()),
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        ("difference_seeds", pa.int64()),
    ]
)
"""A line per row and group, null where nothing has run."""


def write_table(table: Table, root: Path) -> Path:
    """Write all files of a table below the root of the experiments; returns the page's path."""
    store = open_store(str(root / table.name))
    curve = _curve(table)
    store.replace("results.parquet", _parquet(_result_lines(table), RESULTS_SCHEMA))
    store.replace(f"{table.name}.parquet", _parquet(_summary_lines(table), SUMMARY_SCHEMA))
    store.replace(f"{table.name}.md", _markdown(table).encode())
    store.replace(f"{table.name}.json", (json.dumps(_as_json(table), indent=2) + "\n").encode())
    store.replace(f"{table.name}.html", render_table(_page(table, curve)))
    if curve:
        store.replace(f"{table.name}.svg", curve.encode())
    return root / table.name / f"{table.name}.html"


def _result_lines(table: Table) -> list[dict[str, object]]:
    return [
        {
            "variant": row.variant.name,
            "label": row.variant.label,
            "seed": seed,
            "group": group,
            "num_classes": run.num_classes[group],
            "mAP": value,
            "validation_map": run.validation_map,
            "best_epoch": run.best_epoch,
            "seconds": run.seconds,
        }
        for row in table.rows
        for seed in row.seeds
        for run in [table.runs[row.variant.name, seed]]
        for group, value in run.maps.items()
    ]


def _summary_lines(table: Table) -> list[dict[str, object]]:
    lines = []
    for row in table.rows:
        for group in table.groups:
            line: dict[str, object] = {
                "variant": row.variant.name,
                "label": row.variant.label,
                "group": group,
                "seeds": len(row.seeds),
                "failed": len(row.failed),
            }
            if (own := row.maps.get(group)) is not None:
                line |= {key: value for key, value in asdict(own).items() if key != "seeds"}
            if (change := row.differences.get(group)) is not None:
                values = asdict(change)
                line["difference"] = values.pop("mean")
                line |= {f"difference_{key}": value for key, value in values.items()}
            lines.append(line)
    return lines


def _parquet(lines: Sequence[dict[str, object]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(list(lines), schema=schema), sink)
    return sink.getvalue()


def _as_json(table: Table) -> dict[str, object]:
    """What another page needs to show the table, as numbers and as text."""
    return {
        "table": table.name,
        "title": TITLES[table.name][0],
        "lead": lead(table),
        "head": TITLES[table.name][1],
        "dataset": table.dataset,
        "reference": REFERENCE,
        "seeds": table.seeds,
        "replicates": table.replicates,
        "columns": [asdict(column) for column in columns(table)],
        "rows": [
            {
                "variant": row.variant.name,
                "label": row.variant.label,
                "state": _state(row, table.seeds),
                "seeds": row.seeds,
                "failed": row.failed,
                "cells": cells(row, table),
                "groups": {name: asdict(value) for name, value in row.maps.items()},
                "differences": {name: asdict(value) for name, value in row.differences.items()},
                "validation_map": row.validation_map,
                "seconds": row.seconds,
            }
            for row in table.rows
        ],
        "notes": notes(table),
    }


def _state(row: SummaryRow, seeds: Sequence[int]) -> str:
    """Done, failed, begun (some seeds) or to do."""
    if row.failed:
        return "failed"
    if len(row.seeds) == len(seeds):
        return "done"
    return "begun" if row.seeds else "to do"


def _markdown(table: Table) -> str:
    title, head = TITLES[table.name]
    names = [f"{c.name} ({c.count})" if c.count else c.name for c in columns(table)]
    lines = [f"# {title}", "", lead(table), "", _line([head, *names])]
    lines.append("|---" + "|---:" * len(names) + "|")
    for row in table.rows:
        label = f"**{row.variant.label}**" if _is_reference(row) else row.variant.label
        lines.append(_line([label, *cells(row, table)]))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(table))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _page(table: Table, curve: str) -> TablePage:
    title, head = TITLES[table.name]
    rows = [
        Row(row.variant.label, "", cells(row, table), main=_is_reference(row)) for row in table.rows
    ]
    return TablePage(title, lead(table), head, columns(table), rows, notes(table), curve)


def _is_reference(row: SummaryRow) -> bool:
    return row.variant.name == REFERENCE


def _curve(table: Table) -> str:
    """Table 2 as a chart; empty for the others, and before a run."""
    if table.name != "table2":
        return ""
    points = []
    for row in table.rows:
        own = row.maps.get(OVERALL)
        if own is None or own.low is None or own.high is None:
            continue
        label = row.variant.label
        points.append(
            Point(
                x=None if label == ALL else float(label),
                label="ALL" if label == ALL else label,
                value=100 * own.mean,
                low=100 * own.low,
                high=100 * own.high,
                singles=_singles(row, table),
                marked=_is_reference(row),
            )
        )
    return draw_interval_curve(
        points,
        title=f"Test mAP by NUM_IGNORE, {table.dataset}",
        x_title="NUM_IGNORE: attributes left out of the loss per visit",
        y_title="test mAP, % (bars: 95 % over photos, rings: seeds)",
        marked_title="as configured",
    )


def _singles(row: SummaryRow, table: Table) -> tuple[float, ...]:
    """mAP of each seed, percent."""
    values = [table.runs[row.variant.name, seed].maps[OVERALL] for seed in row.seeds]
    return tuple(100 * value for value in values if value is not None)
