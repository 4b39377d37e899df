"""How a table reads: its columns, the text of its cells, and what is what.

Percent everywhere. Shared by Markdown, HTML and JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlal_dist.evaluation.result_table import Column
from vlal_dist.experimenting.results import COMPLETE, OVERALL
from vlal_dist.experimenting.summary import Estimate, Runs, SummaryRow
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
