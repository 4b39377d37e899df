"""Tables of experiments on the page, as the experiments write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import DataError
from vlal_dist.experimenting.grid import (
    Variant,
    ablation_rows,
    table1_rows,
    table2_rows,
)
from vlal_dist.experimenting.results import RunResult, summarise
from vlal_dist.experimenting.tables import Table, write_table
from vlal_dist.reporting.page import render_chart
from vlal_dist.reporting.result_table import parse_table, read_tables


def write_experiments(root: Path) -> None:
    """Table 1 and Table 2 of made-up runs, through the experiments' own writer."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[Variant]] = {
        "table1": table1_rows(),
        "table2": table2_rows([10, 20, 50], "30"),
        "ablations": ablation_rows(LossConfig(), 1.0),
    }
    for name, variants in rows.items():
        runs = {}
        for place, variant in enumerate(variants):
            for seed in (1, 2):
                value = 0.4 + 0.01 * place + 0.002 * seed
                maps = {group: value + 0.01 * n for n, group in enumerate(("overall", "head"))}
                runs[variant.name, seed] = RunResult(
                    maps=dict(maps),
                    num_classes={"overall": 12, "head": 4},
                    replicates={
                        group: center + rng.normal(0, 0.01, 200) for group, center in maps.items()
                    },
                    validation_map=value,
                    best_epoch=2,
                    seconds=90.0,
                )
        done = summarise(variants, runs, seeds=[1, 2])
        write_table(Table(name, "made-up", [1, 2], 200, done, runs), root)


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_experiments(tmp_path)
    first, second, third = read_tables(str(tmp_path))
    assert third.title.startswith("Ablations") and third.chart is None
    assert first.title.startswith("Table 1") and second.title.startswith("Table 2")
    assert "2 of 2" not in first.lead and "made-up" in first.lead
    assert [row.name for row in second.rows if row.main] == ["30"]
    assert all(len(row.cells) == len(first.columns) for row in first.rows)
    assert first.chart is None and second.chart is not None
    assert render_chart(second.chart).count("<circle") == len(second.rows) + 1
    (tmp_path / "table1/table1.json").unlink()
    assert [table.title for table in read_tables(str(tmp_path))] == [second.title, third.title]


def test_none_or_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.experiments: .* holds no table1"):
        read_tables(str(tmp_path))
    for data in (b"{", b"[]", b"{}", b'{"reference": "a", "title": "t"}'):
        with pytest.raises(DataError, match=r"^w is (damaged|not a table of this version)"):
            parse_table(data, where="w")


def test_texts_in_the_chart_are_escaped(tmp_path: Path) -> None:
    write_experiments(tmp_path)
    values: dict[str, Any] = json.loads((tmp_path / "table2/table2.json").read_text())
    values["dataset"] = values["rows"][0]["label"] = "<script>alert(1)</script>"
    table = parse_table(json.dumps(values).encode(), where="w")
    assert table.chart is not None
    text = render_chart(table.chart)
    assert "<script" not in text and "&lt;script&gt;" in text
