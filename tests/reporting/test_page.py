"""The page: self-contained, escaped, small."""

import base64
import hashlib
import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.fixtures.tiny_dataset import HOSTILE
from vlal_dist.config.sections import EvaluationConfig
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.reporting.charts import IntervalChart, IntervalPoint, draw_curve, draw_pr
from vlal_dist.reporting.page import MAX_PAGE_BYTES, Context, render_page
from vlal_dist.reporting.result_table import (
    Column,
    ExperimentTable,
    OtherDataset,
    Row,
    result_columns,
    result_row,
)
from vlal_dist.reporting.run_card import RunFiles
from vlal_dist.reporting.selective_sections import (
    CalibrationSection,
    LikelihoodBin,
)

PIXEL = "data:image/jpeg;base64,AAAA"


LINE = {
    "attribute": HOSTILE,
    "type": HOSTILE,
    "prevalence": HOSTILE,
    "num_positive": 1,
    "num_negative": 2,
    "num_unannotated": 3,
    "ap": 0.5,
    "baseline": 1 / 3,
    "lift": 1.5,
    "mean_score": 0.5,
}


def hostile_page(image: str = PIXEL) -> Context:
    """Every text that comes from data is an attack."""
    curve = draw_curve([(1, 0.1), (2, 0.3)], title=HOSTILE, is_share=True)
    assert curve is not None
    pr_curve = draw_pr(np.array([0.5, 1.0]), np.array([1.0, 0.5]), LINE)
    example = {
        "image": image,
        "width": 1,
        "height": 1,
        "object_name": HOSTILE,
        "instance_id": HOSTILE,
        "image_id": HOSTILE + "2",
        "positives": [HOSTILE],
        "guesses": [
            {"name": name, "score": 0.9, "kind": kind, "truth": truth}
            for name, kind, truth in (
                (HOSTILE, "present", "present"),
                ("b", "absent", "absent"),
                ("c", "unannotated", "absent"),
            )
        ],
    }
    return {
        "title": HOSTILE,
        "config": EvaluationConfig(),
        "seed": 99,
        "warnings": [(HOSTILE, [HOSTILE, HOSTILE])],
        "result": {
            "predictor": "clip",
            "settings": {"top_k": 15},
            "groups": [{"mA": -1}],
            "truth": {"unknown_names": [HOSTILE]},
            "excluded": [HOSTILE],
        },
        "run": RunFiles(HOSTILE, {"method": {"loss": HOSTILE}}),
        "card": [(HOSTILE, HOSTILE)],
        "digests": {HOSTILE: HOSTILE},
        "columns": [Column(HOSTILE, HOSTILE, HOSTILE)],
        "note": HOSTILE,
        "rows": [Row(HOSTILE, ["-"], HOSTILE, main=True), Row(HOSTILE, [HOSTILE], HOSTILE)],
        "others": [
            OtherDataset(
                HOSTILE, HOSTILE, [Column(HOSTILE, HOSTILE)], [Row(HOSTILE, [HOSTILE], HOSTILE)]
            )
        ],
        "photos": 2,
        "replicates": 1000,
        "attributes": [LINE, LINE | {"ap": None, "lift": None}],
        "pr_curves": {"rule": HOSTILE, "groups": {HOSTILE: [pr_curve]}},
        "curves": [curve],
        "ignored_mean": 2.5,
        "ignored": {
            "counted": HOSTILE,
            "summary": HOSTILE,
            "attributes": [
                {"name": HOSTILE, "kind": HOSTILE, "crops": 2, "share": 0.5, "uniform": 0.4}
            ],
        },
        "calibration": CalibrationSection(HOSTILE, [LikelihoodBin(0.1, 0.2, 4, 1)], 0.25),
        "examples": [example],
        "tally": {"present": 0.5, "absent": 0.2, "unannotated": 0.3, "unannotated_true": 0.25},
        "experiments": [
            ExperimentTable(
                title=HOSTILE,
                lead=HOSTILE,
                head=HOSTILE,
                columns=[Column(HOSTILE, HOSTILE)],
                rows=[Row(HOSTILE, [HOSTILE], HOSTILE, main=True)],
                notes=[HOSTILE],
                chart=IntervalChart(HOSTILE, [IntervalPoint(1, HOSTILE, 0.5, 0.4, 0.6)]),
            )
        ],
    }


class Elements(HTMLParser):
    """Collects elements, their attributes and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_hostile_names_stay_text() -> None:
    text = render_page(hostile_page()).decode()
    page = Elements(text)
    tags = [tag for tag, _ in page.found]
    assert tags.count("script") == 1 and tags.count("img") == 1
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    assert HOSTILE in page.texts
    assert html.escape("<script>alert(2)") in text and "<script>alert(2)" not in text


def test_a_section_that_is_left_out_says_why() -> None:
    left_out = dict.fromkeys(("pr_curves", "ignored", "calibration"), HOSTILE)
    page = Elements(render_page(hostile_page() | left_out).decode())
    assert page.texts.count(f"Left out: {HOSTILE}") == 3


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = render_page(hostile_page()).decode()
    text = text.replace("http://www.w3.org/2000/svg", "")  # a namespace, not an address
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", text, flags=re.IGNORECASE)
    links = [
        value
        for _, attributes in Elements(text).found
        for name, value in attributes.items()
        if name in ("src", "href", "action", "srcset", "data", "poster")
    ]
    assert links and all(link and link.startswith(("#", "data:image/jpeg")) for link in links)


def test_the_policy_allows_this_style_and_script_and_no_more() -> None:
    text = render_page(hostile_page()).decode()
    (policy,) = [
        attributes["content"]
        for tag, attributes in Elements(text).found
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes in Elements(text).found)


def test_marks_are_symbol_and_words_and_images_have_a_text() -> None:
    page = Elements(render_page(hostile_page()).decode())
    labels = [attributes.get("aria-label") for _, attributes in page.found]
    assert {"annotated present", "annotated absent", "not annotated"} <= set(labels)
    assert all(attributes.get("alt") for tag, attributes in page.found if tag == "img")
    assert {"✓", "✗", "?"} <= set(page.texts)
    assert "(truly absent)" in page.texts


def test_a_page_that_would_be_too_large_is_refused() -> None:
    image = "data:image/jpeg;base64," + "A" * MAX_PAGE_BYTES
    with pytest.raises(ConfigError, match=r"evaluation\.examples"):
        render_page(hostile_page(image))


def make_result(name: str, count: int = 5) -> dict:  # type: ignore[type-arg]
    group = {"mAP": 0.5, "mAP_vaw": 0.4, "mA": -1, "mR@15": 0.3, "F1@15": 0.2}
    group |= {"num_attributes": 6, "num_classes": count, "num_classes_vaw": 6}
    return {
        "name": name,
        "split": "test",
        "num_samples": 9,
        "dataset": {"name": "tiny", "digest": "d"},
        "settings": {"top_k": 15, "threshold": 0.5},
        "groups": [{"name": "overall", **group}, {"name": "head", **group}],
        "truth": None,
    }


@pytest.mark.parametrize("undefined", ["mA", "mR@15", "mAP"])
def test_the_footnote_explains_every_dash(undefined: str) -> None:
    main = make_result("main")
    for group in main["groups"]:
        group |= {"mA": 0.5} | {undefined: None if undefined == "mAP" else -1}
    page = hostile_page() | {
        "columns": result_columns(main, {}),
        "rows": [result_row(main, main, where="m", is_main=True)],
    }
    assert "-: not defined." in render_page(page).decode()
    for group in main["groups"]:
        group |= {undefined: 0.25}
    page["rows"] = [result_row(main, main, where="m", is_main=True)]
    assert "-: not defined." not in render_page(page).decode()


def test_rows_name_another_protocol() -> None:
    main, other = make_result("main"), make_result("other")
    other["settings"] = {**other["settings"], "unannotated": "negative"}
    note = result_row(other, main, where="o").note
    assert note == "9 crops, unannotated pairs count as negative"
    assert result_row(main, other, where="m").note == "9 crops, unannotated pairs excluded"
    assert result_row(main, main, where="m").note == "9 crops"


def test_compared_rows_say_what_differs() -> None:
    main = make_result("main")
    columns = result_columns(main, {"overall": (0.4, 0.6), "head": (float("nan"), float("nan"))})
    assert [column.name for column in columns] == [
        *("overall", "head", "mAP_vaw", "mA", "mR@15", "F1@15")
    ]
    assert columns[0].count == "5 of 6" and columns[0].interval == "[40.00, 60.00]"
    assert not any(column.interval for column in columns[1:])
    row = result_row(main, main, where="m", is_main=True)
    assert row.cells == ["50.00", "50.00", "40.00", "-", "30.00", "20.00"]
    assert row.note == "9 crops" and row.main
    other = make_result("other", count=4)
    other["dataset"] = {"name": "new", "digest": "e"}
    other["split"] = "val"
    del other["groups"][1]
    row = result_row(other, main, where="o")
    assert row.cells[:2] == ["50.00 (4)", "-"]
    assert row.note == "9 crops, split val, another dataset: new"
    for wrong in ({}, [], {"groups": []}):
        with pytest.raises(DataError, match="o is not a result"):
            result_row(wrong, main, where="o")
