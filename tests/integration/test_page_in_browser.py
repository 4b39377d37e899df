"""The written page as a user opens it: from disk, in a real browser."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.conftest import dataset, dataset_root  # noqa: F401
from tests.evaluation.test_programs import Runner, write_run
from tests.fixtures.browser import PROGRAM, Browser
from tests.fixtures.tiny_dataset import HOSTILE, VOCABULARY
from tests.reporting.test_experiment_tables import write_experiments
from tests.reporting.test_page import hostile_page, make_result
from vlal_dist.reporting.page import render_page
from vlal_dist.reporting.result_table import result_columns, result_row

pytestmark = pytest.mark.skipif(
    shutil.which(PROGRAM) is None, reason=f"no {PROGRAM} (Debian: apt-get install {PROGRAM})"
)

WIDTH, PHONE = 1280, 390
SECTIONS = {
    *("run", "result", "attributes", "curves"),
    *("examples", "training", "ignored", "likelihood", "experiments"),
}
COLUMN = """[...document.querySelectorAll("#attribute-table tbody tr:not([hidden])")]
    .map((row) => row.cells[{}].textContent)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, dataset_root: Path) -> Path:  # noqa: F811
    """What evaluate and report write about a small run with a hostile attribute name."""
    folder = tmp_path_factory.mktemp("report")
    write_run(str(folder / "run"))
    write_experiments(folder / "experiments")
    tables = ("--evaluation.experiments", str(folder / "experiments"))
    runner = Runner(folder, dataset_root, str(folder / "run"))
    assert runner("evaluate") == 0 and runner("report", *tables) == 0
    return folder / "run" / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section, and an attack in every text."""
    path = tmp_path_factory.mktemp("hostile") / "page.html"
    path.write_bytes(render_page(hostile_page()))
    return path


def test_a_result_table_of_many_groups_is_shown_whole(browser: Browser, tmp_path: Path) -> None:
    main = make_result("main")
    main["groups"] += [main["groups"][0] | {"name": f"type {number}"} for number in range(47)]
    row = result_row(main, main, where="m", is_main=True)
    path = tmp_path / "page.html"
    path.write_bytes(
        render_page(hostile_page() | {"columns": result_columns(main, {}), "rows": [row]})
    )
    browser.open(path, width=WIDTH)
    box = "document.querySelector('#result .scroll')"
    assert browser.value(f"{box}.querySelectorAll('tbody tr').length") == 2 + 47 + 4
    assert browser.value(f"{box}.scrollHeight - {box}.clientHeight") == 0


@pytest.mark.parametrize("name", ["report", "hostile"])
def test_it_opens_from_disk_without_an_error_or_a_request(
    browser: Browser, request: pytest.FixtureRequest, name: str
) -> None:
    path: Path = request.getfixturevalue(name)
    browser.open(path, width=WIDTH)
    assert HOSTILE in browser.value("document.body.innerText")
    pixels = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"))
    assert len(np.unique(pixels)) > 50 and pixels.shape[1] <= WIDTH
    shown = SECTIONS | ({"warnings"} if name == "hostile" else set())
    assert browser.value("document.getElementById('warnings') !== null") == (name == "hostile")
    for section in shown:
        height = f"document.getElementById('{section}').getBoundingClientRect().height"
        assert browser.value(height) > 40, section
    requested = {
        one["request"]["url"].split(",")[0] for one in browser.seen("Network.requestWillBeSent")
    }
    assert requested - {path.as_uri(), "data:image/jpeg;base64"} == set()
    for event in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening", "Log.entryAdded"):
        assert browser.seen(event) == [], event
    assert not [one for one in browser.seen("Runtime.consoleAPICalled") if one["type"] == "error"]
    assert browser.value("document.querySelectorAll('script').length") == 1
    assert browser.value("document.querySelectorAll('img[onerror], img[src=x]').length") == 0


@pytest.mark.parametrize("name", ["report", "hostile"])
@pytest.mark.parametrize("width", [WIDTH, PHONE])
def test_nothing_is_wider_than_the_window(
    browser: Browser, request: pytest.FixtureRequest, name: str, width: int
) -> None:
    browser.open(request.getfixturevalue(name), width=width)
    room = browser.value("document.documentElement.clientWidth")
    assert browser.value("document.documentElement.scrollWidth") <= room <= width


def test_a_heading_sorts_by_mouse_and_by_keyboard(browser: Browser, report: Path) -> None:
    browser.open(report, width=WIDTH)
    names = browser.value(COLUMN.format(0))
    assert names == list(VOCABULARY.attributes)
    button = "document.querySelectorAll('#attribute-table th button')[{}]"
    browser.value(button.format(3) + ".click()")
    counts = [int(text) for text in browser.value(COLUMN.format(3))]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 2
    browser.value(button.format(0) + ".focus()")
    browser.press("Enter", 13)
    assert sorted(names, key=str.casefold)[-1] == browser.value(COLUMN.format(0))[-1]
    browser.press("Enter", 13)
    assert sorted(names, key=str.casefold)[-1] == browser.value(COLUMN.format(0))[0]
    states = "[...document.querySelectorAll('#attribute-table thead th')].map((e) => e.ariaSort)"
    assert browser.value(states) == ["descending", *[None] * 9]


def test_attributes_without_an_ap_sort_last(browser: Browser, hostile: Path) -> None:
    browser.open(hostile, width=WIDTH)
    for _ in range(2):
        browser.value("document.querySelectorAll('#attribute-table th button')[6].click()")
        assert browser.value(COLUMN.format(6)) == ["50.00", "-"]


def test_the_filter_box_keeps_what_contains_the_text(browser: Browser, report: Path) -> None:
    browser.open(report, width=WIDTH)
    browser.value("document.getElementById('filter').focus()")
    browser.call("Input.insertText", text="SHAPE")
    assert browser.value(COLUMN.format(0)) == ["round", "square"]
    count = "document.querySelector('.filter output').textContent"
    assert browser.value(count) == f"2 of {len(VOCABULARY.attributes)} attributes"
