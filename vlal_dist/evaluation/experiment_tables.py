"""Tables of `vlal_dist.experiments` as the page shows them: many runs, several seeds.

Read from `ROOT/TABLE/TABLE.json` for table1, table2 and ablations: `title`, `lead`, `head`,
`reference`, `columns` (name, count), `rows` (variant, label, cells, groups), `notes`. Nothing of
them but text and numbers reaches the page.
"""

import json
from dataclasses import dataclass
from typing import Any

import markupsafe

from vlal_dist.errors import DataError
from vlal_dist.evaluation.interval_curve import Point, draw_interval_curve
from vlal_dist.evaluation.result_table import Column, Row
from vlal_dist.storage.store import open_store

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
