"""A result table as one self-contained HTML page, with a chart where there is one.

Like the report: all texts are escaped, and the page allows its own style and nothing else.
"""

from dataclasses import dataclass
from importlib import resources

import jinja2
import markupsafe

from vlal_dist.evaluation.page import hash_of
from vlal_dist.evaluation.result_table import Column, Row


@dataclass(frozen=True)
class TablePage:
    """All that the template shows.

    Attributes:
        title, lead: heading and the line below it.
        head: heading of the rows' names.
        columns, rows: the table; a row has a cell per column.
        notes: what is what, below it.
        curve: SVG text from `draw_interval_curve`, which escapes its texts; empty: none.
    """

    title: str
    lead: str
    head: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    curve: str = ""


def render_table(page: TablePage) -> bytes:
    """The page as UTF-8 HTML."""
    source = resources.files("vlal_dist.evaluation").joinpath("table.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string(source).render(
        page=page,
        curve=markupsafe.Markup(page.curve),
        style_hash=hash_of(source, "style"),
    )
    return text.encode()
