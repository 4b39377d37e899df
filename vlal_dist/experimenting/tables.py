"""Tables of experiments: Parquet, Markdown, HTML and JSON files.

Percent everywhere. Shared by Markdown, HTML and JSON.

Shares are of 1 in Parquet and JSON, percent where people read them.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from vlal_dist.experimenting.grid import ALL, REFERENCE
from vlal_dist.experimenting.results import COMPLETE, OVERALL
from vlal_dist.experimenting.summary import Estimate, Runs, SummaryRow
from vlal_dist.reporting.interval_chart import Point, draw_interval_curve
from vlal_dist.reporting.page import TablePage, render_table
from vlal_dist.reporting.result_table import Column, Row
from vlal_dist.storage.store import open_store
from vlal_dist.vocabulary import PREVALENCES

TITLES = {
    "table1": ("Table 1: losses on the same data", "loss"),
    "table2": ("Table 2: how many attributes are ignored", "NUM_IGNORE"),
    "ablations": ("Ablations: one change each", "change"),
}
"""Table -> title, heading of its rows."""


MOST_TYPES = 12
"""Attribute types that still have columns; VAW has 8, its Table 1 shows them. More: Parquet."""


@dataclass(frozen=True)
class Table:
    """All of a table.

    Attributes:
        name: table1, table2 or ablations.
        dataset: name of the dataset.
        seeds: asked for.
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
        """Those with columns of their own: all, or without the types where they are many."""
        others = {name: count for name, count in self.groups.items() if name != OVERALL}
        types = [name for name in others if name not in (*PREVALENCES, COMPLETE)]
        if len(types) > MOST_TYPES:
            others = {name: count for name, count in others.items() if name not in types}
        return others


def lead(table: Table) -> str:
    """The line below the title."""
    done = sum(len(row.seeds) for row in table.rows)
    return (
        f"{table.dataset}, test split, mAP in percent; seeds {', '.join(map(str, table.seeds))}; "
        f"{done} of {len(table.rows) * len(table.seeds)} runs done."
    )


def columns(table: Table) -> list[Column]:
    """All columns but the rows' names."""
    count = table.groups[OVERALL]
    first = [
        Column("seeds", ""),
        Column("mAP", f"{count} attributes" if count else ""),
        Column("its interval", "95 %, photos"),
        Column("minus selective", "95 %, photos"),
        Column("minus selective", "± over seeds"),
    ]
    groups = [Column(name, f"{count} attributes") for name, count in table.shown.items()]
    return [
        *first,
        *groups,
        Column("validation mAP", "of the best epoch"),
        Column("seconds", "of a run"),
    ]


def cells(row: SummaryRow, table: Table) -> list[str]:
    """A row's text under each of `columns`."""
    own, change = row.maps.get(OVERALL), row.differences.get(OVERALL)
    texts = [
        _seeds(row, table.seeds),
        _spread(own),
        "" if own is None else _ends(own, sign=False),
        "" if change is None else f"{100 * change.mean:+.2f} ({_ends(change, sign=True)})",
        _spread(change, sign=True),
    ]
    texts += [_spread(row.maps.get(name)) for name in table.shown]
    texts.append("" if row.validation_map is None else f"{100 * row.validation_map:.2f}")
    texts.append("" if row.seconds is None else f"{row.seconds:.0f}")
    return [text.replace("-", "\N{MINUS SIGN}") for text in texts]


def _seeds(row: SummaryRow, seeds: Sequence[int]) -> str:
    failed = f"{len(row.failed)} failed" if len(seeds) > 1 else "failed"
    if not row.seeds:
        return failed if row.failed else ""
    text = str(len(row.seeds))
    if len(row.seeds) < len(seeds):
        text += f" of {len(seeds)}"
    return f"{text}, {failed}" if row.failed else text


def _spread(value: Estimate | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    mean = f"{100 * value.mean:+.2f}" if sign else f"{100 * value.mean:.2f}"
    return mean if value.sd is None else f"{mean} ± {100 * value.sd:.2f}"


def _ends(value: Estimate, *, sign: bool) -> str:
    if value.low is None or value.high is None:
        return ""
    style = "+.2f" if sign else ".2f"
    return f"{100 * value.low:{style}} to {100 * value.high:{style}}"


def notes(table: Table) -> list[str]:
    """The table's foot: what is what."""
    found = [
        "mAP: mean over the attributes with an annotated positive and an annotated negative in the "
        "test split, of the model that was best on the validation split. After ±: sample standard "
        "deviation over seeds.",
        f"Intervals: central 95 % of {table.replicates} replicates of the Bayesian bootstrap over "
        "test photos (Rubin 1981: all photos keep a positive weight, so the list of attributes "
        "stays), about the mean over seeds. They say what other test photos would change, not what "
        "other seeds would; that is what ± says.",
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
        found.append("Complete labels: mAP on what is true of every attribute, annotated or not.")
    if any(row.failed for row in table.rows):
        found.append("Failed runs: their log.txt and failed.json say why; a repeat tries again.")
    return found


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
