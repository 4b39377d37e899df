"""Tables of experiments as Parquet, Markdown, HTML, JSON and SVG files.

Numbers in Parquet and JSON are shares of 1, texts are in percent.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from vlal_dist.experimenting.grid import REFERENCE
from vlal_dist.experimenting.results import COMPLETE, OVERALL, Estimate, Runs, SummaryRow
from vlal_dist.reporting.page import render_chart, render_table
from vlal_dist.reporting.result_table import Column, ExperimentTable, experiment_table
from vlal_dist.storage.store import open_store
from vlal_dist.vocabulary import PREVALENCES

TITLES = {
    "table1": ("Table 1: losses on the same data", "loss"),
    "table2": ("Table 2: how many attributes are ignored", "NUM_IGNORE"),
    "ablations": ("Ablations: one change each", "change"),
}
"""Table -> title, heading of its rows."""

MAX_TYPES = 12
"""Attribute types that still have columns; VAW has 8, its Table 1 shows them. More: Parquet."""

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


@dataclass(frozen=True)
class Table:
    """A table of experiments.

    Attributes:
        name: table1, table2 or ablations.
        dataset: name of the dataset.
        seeds: of the experiment.
        replicates: of the bootstrap.
        rows: in order.
        runs: the finished ones behind them.
    """

    name: str
    dataset: str
    seeds: list[int]
    replicates: int
    rows: list[SummaryRow]
    runs: Runs

    @property
    def groups(self) -> dict[str, int]:
        """Group -> attributes behind its mAP, from any finished run; overall alone before one."""
        return next((run.num_classes for run in self.runs.values()), {OVERALL: 0})

    @property
    def shown(self) -> dict[str, int]:
        """Groups with columns of their own: all, or without the types where they are many."""
        others = {name: count for name, count in self.groups.items() if name != OVERALL}
        types = [name for name in others if name not in (*PREVALENCES, COMPLETE)]
        if len(types) > MAX_TYPES:
            others = {name: count for name, count in others.items() if name not in types}
        return others


def write_table(table: Table, root: Path) -> Path:
    """Write all files of a table below the root of the experiments; returns the page's path."""
    values = _values(table)
    singles = {
        row.variant.name: [
            100 * value
            for seed in row.seeds
            if (value := table.runs[row.variant.name, seed].maps[OVERALL]) is not None
        ]
        for row in table.rows
    }
    shown, name = experiment_table(values, singles), table.name
    files = {
        "results.parquet": _parquet(_result_lines(table), RESULTS_SCHEMA),
        f"{name}.parquet": _parquet(_summary_lines(table), SUMMARY_SCHEMA),
        f"{name}.md": _markdown(shown).encode(),
        f"{name}.json": (json.dumps(values, indent=2) + "\n").encode(),
        f"{name}.html": render_table(shown),
    }
    if shown.chart is not None:
        files[f"{name}.svg"] = render_chart(shown.chart).encode()
    store = open_store(str(root / name))
    for key, data in files.items():
        store.replace(key, data)
    return root / name / f"{name}.html"


def _values(table: Table) -> dict[str, Any]:
    """Content of the JSON file: all that another page needs, as numbers and as text."""
    title, head = TITLES[table.name]
    done = sum(len(row.seeds) for row in table.rows)
    return {
        "table": table.name,
        "title": title,
        "lead": (
            f"{table.dataset}, test split, mAP in percent; seeds "
            f"{', '.join(map(str, table.seeds))}; {done} of {len(table.rows) * len(table.seeds)} "
            "runs done."
        ),
        "head": head,
        "dataset": table.dataset,
        "reference": REFERENCE,
        "seeds": table.seeds,
        "replicates": table.replicates,
        "columns": [asdict(column) for column in _columns(table)],
        "rows": [
            {
                "variant": row.variant.name,
                "label": row.variant.label,
                "state": _state(row, table.seeds),
                "seeds": row.seeds,
                "failed": row.failed,
                "cells": _cells(row, table),
                "groups": {name: asdict(value) for name, value in row.maps.items()},
                "differences": {name: asdict(value) for name, value in row.differences.items()},
                "validation_map": row.validation_map,
                "seconds": row.seconds,
            }
            for row in table.rows
        ],
        "notes": _notes(table),
    }


def _columns(table: Table) -> list[Column]:
    """All columns but the rows' names."""
    count = table.groups[OVERALL]
    return [
        Column("seeds", ""),
        Column("mAP", f"{count} attributes" if count else ""),
        Column("its interval", "95 %, photos"),
        Column("minus selective", "95 %, photos"),
        Column("minus selective", "± over seeds"),
        *(Column(name, f"{count} attributes") for name, count in table.shown.items()),
        Column("validation mAP", "of the best epoch"),
        Column("seconds", "of a run"),
    ]


def _cells(row: SummaryRow, table: Table) -> list[str]:
    """A row's text under each column."""
    own, change = row.maps.get(OVERALL), row.differences.get(OVERALL)
    texts = [
        _seeds(row, table.seeds),
        _spread(own),
        "" if own is None else _ends(own, ".2f"),
        "" if change is None else f"{100 * change.mean:+.2f} ({_ends(change, '+.2f')})",
        _spread(change, "+.2f"),
        *(_spread(row.maps.get(name)) for name in table.shown),
        "" if row.validation_map is None else f"{100 * row.validation_map:.2f}",
        "" if row.seconds is None else f"{row.seconds:.0f}",
    ]
    return [text.replace("-", "\N{MINUS SIGN}") for text in texts]


def _seeds(row: SummaryRow, seeds: Sequence[int]) -> str:
    failed = f"{len(row.failed)} failed" if len(seeds) > 1 else "failed"
    done = str(len(row.seeds)) if row.seeds else ""
    if 0 < len(row.seeds) < len(seeds):
        done += f" of {len(seeds)}"
    return ", ".join(filter(None, [done, failed if row.failed else ""]))


def _spread(value: Estimate | None, style: str = ".2f") -> str:
    if value is None:
        return ""
    mean = f"{100 * value.mean:{style}}"
    return mean if value.sd is None else f"{mean} ± {100 * value.sd:.2f}"


def _ends(value: Estimate, style: str) -> str:
    if value.low is None or value.high is None:
        return ""
    return f"{100 * value.low:{style}} to {100 * value.high:{style}}"


def _state(row: SummaryRow, seeds: Sequence[int]) -> str:
    """Done, failed, started (some seeds) or to do."""
    if row.failed:
        return "failed"
    if len(row.seeds) == len(seeds):
        return "done"
    return "started" if row.seeds else "to do"


def _notes(table: Table) -> list[str]:
    """Explanations below the table."""
    found = [
        "mAP: mean over the attributes with an annotated positive and an annotated negative in the "
        "test split, of the model that was best on the validation split. After ±: sample standard "
        "deviation over seeds.",
        f"Intervals: central 95 % of {table.replicates} replicates of the Bayesian bootstrap over "
        "test photos (Rubin 1981: all photos keep a positive weight, so the list of attributes "
        "stays), about the mean over seeds. They cover the variation over test photos, not over "
        "seeds; ± covers seeds.",
        "Minus selective: difference of the means over the seeds that both rows have; a replicate "
        "weighs the photos alike for both, and a seed gives both the same initial weights and "
        "order. First with its interval, then with the standard deviation of the difference seed "
        "by seed.",
        "Seconds: training and evaluation, mean over seeds; attempts that were killed do not "
        "count, and runs beside each other slow each other down.",
    ]
    if len(table.shown) < len(table.groups) - 1:
        found.append("mAP of each attribute type: in the table's Parquet file.")
    if COMPLETE in table.groups:
        found.append("Complete labels: mAP on the truth of every attribute, annotated or not.")
    if any(row.failed for row in table.rows):
        found.append("Failed runs: see their log.txt and failed.json; a repeat tries them again.")
    return found


def _result_lines(table: Table) -> Iterator[dict[str, object]]:
    for row in table.rows:
        for seed in row.seeds:
            run = table.runs[row.variant.name, seed]
            for group, value in run.maps.items():
                yield {
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


def _summary_lines(table: Table) -> Iterator[dict[str, object]]:
    for row in table.rows:
        for group in table.groups:
            line: dict[str, object] = {}
            if (own := row.maps.get(group)) is not None:
                line |= asdict(own)
            if (change := row.differences.get(group)) is not None:
                line |= {f"difference_{key}": value for key, value in asdict(change).items()}
                line["difference"] = line.pop("difference_mean")
            yield line | {
                "variant": row.variant.name,
                "label": row.variant.label,
                "group": group,
                "seeds": len(row.seeds),
                "failed": len(row.failed),
            }


def _parquet(lines: Iterator[dict[str, object]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(list(lines), schema=schema), sink)
    return sink.getvalue()


def _markdown(table: ExperimentTable) -> str:
    names = [f"{c.name} ({c.count})" if c.count else c.name for c in table.columns]
    rows = [[table.head, *names]]
    rows += [[f"**{row.name}**" if row.main else row.name, *row.cells] for row in table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * len(names) + "|")
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"# {table.title}", "", table.lead, "", *lines, "", *notes]) + "\n"
