"""The HTML report and table pages: self-contained files that open from disk.

All texts pass jinja2's autoescape: names are data. The page carries a Content-Security-Policy that
allows its own style and script by their hashes, images as data URIs, and nothing else.

Like the report: all texts are escaped, and the page allows its own style and nothing else.
"""

import base64
import hashlib
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import markupsafe

from vlal_dist.errors import ConfigError
from vlal_dist.evaluation.results import percent
from vlal_dist.reporting.fig4 import Example
from vlal_dist.reporting.pr_curves import PrSection
from vlal_dist.reporting.result_table import Column, ExperimentTable, Row
from vlal_dist.reporting.selective_sections import CalibrationSection, IgnoredSection
from vlal_dist.reporting.training_curves import Curve

MAX_PAGE_BYTES = 10_000_000


@dataclass(frozen=True)
class Page:
    """All that the template shows; a section that is a text says why it is left out.

    Attributes:
        title: heading.
        card: run card, (name, value).
        config: the run's resolved configuration as YAML, or empty.
        digests: (name, digest in full).
        columns, rows: the result table.
        interval_note: what the intervals are, or why there are none.
        notes: remarks below it.
        excluded: attributes without a positive or without a negative in the split.
        attributes: rows of `attributes.parquet`, plus `baseline` and `lift`.
        pr_curves: precision-recall curves.
        curves: training curves.
        ignored_mean: the effective number ignored beside NUM_IGNORE, in words, or empty.
        ignored: which attributes were ignored.
        calibration: likelihood against annotation.
        examples: cells of the grid.
        example_rule: how they were chosen.
        tally: shares of the highest attributes by annotation, over all crops.
        top: how many attributes are listed per crop.
        has_truth: complete labels are known.
        experiments: tables of `vlal_dist.experiments`; none: no such section.
    """

    title: str
    card: list[tuple[str, str]]
    config: str
    digests: list[tuple[str, str]]
    columns: list[Column]
    rows: list[Row]
    interval_note: str
    notes: list[str]
    excluded: list[str]
    attributes: list[dict[str, Any]]
    pr_curves: PrSection | str
    curves: list[Curve]
    ignored_mean: str
    ignored: IgnoredSection | str
    calibration: CalibrationSection | str
    examples: list[Example]
    example_rule: str
    tally: dict[str, float]
    top: int
    has_truth: bool = field(default=False)
    experiments: list[ExperimentTable] = field(default_factory=list)

    @property
    def has_intervals(self) -> bool:
        """Whether a figure of the result table has an interval."""
        return any(column.interval for column in self.columns)


def render_page(page: Page) -> bytes:
    """The page as UTF-8 HTML.

    Raises:
        ConfigError: it would exceed `MAX_PAGE_BYTES`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    style, script = _part("style.css"), _part("script.js")
    text = environment.get_template("page.html").render(
        page=page,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    data = text.encode()
    if len(data) > MAX_PAGE_BYTES:
        raise ConfigError(
            f"the page has {len(data)} bytes, more than {MAX_PAGE_BYTES}; lower "
            "evaluation.examples, evaluation.curves or the number of files in evaluation.compare"
        )
    return data


def _part(name: str) -> str:
    """A file of `templates`: a section, the style, the script."""
    return resources.files("vlal_dist.reporting").joinpath("templates", name).read_text("utf-8")


def hash_of(source: str, tag: str) -> str:
    """CSP hash of a text's only element of that name, which must have no template code in it."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, flags=re.DOTALL)
    return _hash(content)


def _hash(content: str) -> str:
    """What the Content-Security-Policy calls an element of that content by."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


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
    source = _part("table.html")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string(source).render(
        page=page,
        curve=markupsafe.Markup(page.curve),
        style_hash=hash_of(source, "style"),
    )
    return text.encode()
