"""The report: one self-contained HTML page, nothing loaded from elsewhere, opens from disk.

All texts pass jinja2's autoescape: names are data. The page carries a Content-Security-Policy that
allows its own style and script by their hashes, images as data URIs, and nothing else.
"""

import base64
import hashlib
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from vlal_dist.errors import ConfigError, DataError
from vlal_dist.evaluation.curves import Curve
from vlal_dist.evaluation.examples import Example
from vlal_dist.evaluation.results import headline_metrics, percent

MAX_PAGE_BYTES = 10_000_000


@dataclass(frozen=True)
class Column:
    """A column of the result table: its heading and how many attributes count in it."""

    name: str
    count: str


@dataclass(frozen=True)
class Row:
    """A row of the result table.

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


@dataclass(frozen=True)
class Page:
    """All that the template shows.

    Attributes:
        title: heading.
        card: run card, (name, value).
        config: the run's resolved configuration as YAML, or empty.
        columns, rows: the result table.
        notes: remarks below it.
        excluded: attributes without a positive or without a negative in the split.
        curves: training curves.
        ignored: the effective number ignored beside NUM_IGNORE, in words, or empty.
        attributes: rows of `attributes.parquet`, plus `baseline`.
        examples: cells of the grid.
        example_rule: how they were chosen.
        tally: shares of the highest attributes by annotation, over all crops.
        top: how many attributes are listed per crop.
        has_truth: complete labels are known.
    """

    title: str
    card: list[tuple[str, str]]
    config: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    excluded: list[str]
    curves: list[Curve]
    ignored: str
    attributes: list[dict[str, Any]]
    examples: list[Example]
    example_rule: str
    tally: dict[str, float]
    top: int
    has_truth: bool = field(default=False)


def render_page(page: Page) -> bytes:
    """The page as UTF-8 HTML.

    Raises:
        ConfigError: it would exceed `MAX_PAGE_BYTES`.
    """
    source = resources.files("vlal_dist.evaluation").joinpath("page.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    text = environment.from_string(source).render(
        page=page,
        style_hash=hash_of(source, "style"),
        script_hash=hash_of(source, "script"),
    )
    data = text.encode()
    if len(data) > MAX_PAGE_BYTES:
        raise ConfigError(
            f"the page has {len(data)} bytes, more than {MAX_PAGE_BYTES}; lower "
            "evaluation.examples or the number of files in evaluation.compare"
        )
    return data


def result_columns(result: dict[str, Any]) -> list[Column]:
    """The groups of Table 1 by `mAP`, then the VAW evaluator's overall metrics."""
    columns = [
        Column(group["name"], f"{group['num_classes']} of {group['num_attributes']}")
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


def hash_of(source: str, tag: str) -> str:
    """CSP hash of the template's only element of that name, which has no template code in it."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, flags=re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
