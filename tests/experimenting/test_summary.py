"""Means, spreads and paired intervals against their definitions."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from vlal_dist.experimenting.grid import Variant, table1_rows, table2_rows
from vlal_dist.experimenting.results import COMPLETE, RunResult, SummaryRow, summarise
from vlal_dist.experimenting.tables import Table, write_table

SEEDS = [1, 2, 3]
GROUPS = {"overall": 7, "head": 4, "empty": 0, COMPLETE: 8}


def run(seed: int, shift: float) -> RunResult:
    """Replicates of all rows of a seed share their noise, as photos weighed alike do."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(scale=0.05, size=400)
    maps = {"overall": 0.5 + shift + seed / 1000, "head": 0.6 + shift, "empty": None, COMPLETE: 0.4}
    replicates = {
        name: np.full(400, np.nan) if value is None else value + noise
        for name, value in maps.items()
        if name != COMPLETE
    }
    return RunResult(maps, GROUPS, replicates, 0.45 + shift, 3, 10.0 * seed)


def rows(variants: list[Variant]) -> tuple[list[SummaryRow], dict[tuple[str, int], RunResult]]:
    runs = {
        (variant.name, seed): run(seed, 0.01 * place * (1 + seed / 10))
        for place, variant in enumerate(variants[:-1])
        for seed in SEEDS
        if (place, seed) != (1, 3)
    }
    runs |= {(variants[-1].name, seed): run(seed, -0.02) for seed in SEEDS}
    failed = frozenset({(variants[1].name, 3)})
    return summarise(variants, runs, seeds=SEEDS, failed=failed), runs


def test_means_and_paired_differences() -> None:
    found, runs = rows(table1_rows())
    third = found[2]
    maps = [runs[third.variant.name, seed].maps["overall"] for seed in SEEDS]
    base = [runs["selective", seed].maps["overall"] for seed in SEEDS]
    change = np.subtract(maps, base)
    assert third.maps["overall"].mean == pytest.approx(np.mean(maps))
    assert third.maps["overall"].sd == pytest.approx(np.std(maps, ddof=1))
    assert third.differences["overall"].mean == pytest.approx(change.mean())
    assert third.differences["overall"].sd == pytest.approx(change.std(ddof=1))
    # The noise of the photos is common and cancels; it shows in the row's own interval.
    difference, own = third.differences["overall"], third.maps["overall"]
    assert difference.low == pytest.approx(change.mean()) == difference.high
    assert own.low is not None and own.high is not None and 0.05 < own.high - own.low < 0.2
    assert third.seconds == pytest.approx(20) and "empty" not in third.maps
    assert third.maps[COMPLETE].low is None and third.maps[COMPLETE].mean == pytest.approx(0.4)


def test_a_row_is_compared_over_the_seeds_that_both_have() -> None:
    found, runs = rows(table1_rows())
    second = found[1]
    assert second.seeds == [1, 2] and second.failed == [3]
    change = [
        runs[second.variant.name, seed].maps["head"] - runs["selective", seed].maps["head"]
        for seed in (1, 2)
    ]
    assert second.differences["head"].mean == pytest.approx(np.mean(change))
    assert second.differences["head"].seeds == 2
    assert found[-1].differences == {}
    (single,) = summarise(table1_rows()[-1:], runs, seeds=[1])
    assert single.maps["overall"].sd is None


def test_files_say_the_same_and_nothing_is_loaded_or_run(tmp_path: Path) -> None:
    variants = table2_rows([10, 20], "20")
    hostile = Variant("num_ignore-10", "10", {})
    variants = [variants[0], hostile, *variants[2:]]
    found, runs = rows(variants)
    table = Table("table2", "<b>data</b>|x", SEEDS, 400, found, runs)
    page = write_table(table, tmp_path).read_text()
    folder = tmp_path / "table2"
    assert "<b>" not in page and "&lt;b&gt;data" in page
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<svg" in page and (folder / "table2.svg").read_text().strip() in page
    assert 'style="' not in page  # the page's policy would drop it
    values = json.loads((folder / "table2.json").read_text())
    assert [row["label"] for row in values["rows"]] == ["0", "10", "20", "all"]
    assert [row["state"] for row in values["rows"]] == ["done", "failed", "done", "done"]
    text = (folder / "table2.md").read_text()
    for row in values["rows"]:
        assert len(row["cells"]) == len(values["columns"])
        for cell in filter(None, row["cells"]):
            assert cell in text and cell in page
    lines = pyarrow.parquet.read_table(folder / "results.parquet").to_pylist()
    assert len(lines) == len(runs) * len(GROUPS)
    summary = pyarrow.parquet.read_table(folder / "table2.parquet").to_pylist()
    first = next(line for line in summary if line["group"] == "overall")
    assert first["mean"] == found[0].maps["overall"].mean
    assert first["difference"] == found[0].differences["overall"].mean


def test_rows_without_a_run_are_there_and_empty(tmp_path: Path) -> None:
    for name, variants in (("table1", table1_rows()), ("table2", table2_rows([10], "30"))):
        found = summarise(variants, {}, seeds=SEEDS, failed=frozenset({("selective", 1)}))
        write_table(Table(name, "data", SEEDS, 10, found, {}), tmp_path)
        text = (tmp_path / name / f"{name}.md").read_text()
        assert len(re.findall(r"^\| (?!loss|NUM)", text, re.MULTILINE)) == len(variants)
        assert "1 failed" in text and not (tmp_path / name / f"{name}.svg").exists()
        summary = pyarrow.parquet.read_table(tmp_path / name / f"{name}.parquet").to_pylist()
        assert len(summary) == len(variants) and summary[0]["mean"] is None


def test_many_types_stay_in_the_parquet_file(tmp_path: Path) -> None:
    for count, there in ((12, True), (13, False)):
        maps = {"overall": 0.5, "head": 0.6, **{f"type {n}": 0.4 for n in range(count)}}
        result = RunResult(maps, dict.fromkeys(maps, 3), {}, 0.5, 1, None)  # type: ignore[arg-type]
        runs = {("selective", 1): result}
        found = summarise(table1_rows(), runs, seeds=[1])
        write_table(Table("table1", "data", [1], 10, found, runs), tmp_path)
        text = (tmp_path / "table1" / "table1.md").read_text()
        assert ("type 11" in text) == there and "head (3 attributes)" in text
        assert ("Parquet file" in text) != there
        lines = pyarrow.parquet.read_table(tmp_path / "table1" / "table1.parquet").to_pylist()
        assert f"type {count - 1}" in {line["group"] for line in lines}
