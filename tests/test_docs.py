"""Documentation: links resolve, lines fit, and the list of modules is current."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("clusters/**/*.md"), *ROOT.glob("docs/**/*.md")])
WIDTH = 100


def prose(text: str) -> list[str]:
    """The lines of a page without tables, images, links on their own, and code blocks."""
    found, fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not (fenced or line.startswith(("|", "    ", "![")) or re.match(r" {4,}", line)):
            found.append(line)
    return found


def anchors(path: Path) -> set[str]:
    """Names of a page's headings, as links use them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_of_prose_fit(page: Path) -> None:
    long = [line for line in prose(page.read_text(encoding="utf-8")) if len(line) > WIDTH]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def test_the_list_of_modules_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs/build.py"))["modules_page"]()
    assert page == (ROOT / "docs/modules.md").read_text(encoding="utf-8"), "run make docs"
