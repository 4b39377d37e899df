"""Rows of the tables; tables share runs."""

import itertools

import pytest

from vlal_dist.config.load import load_config
from vlal_dist.config.sections import LossConfig
from vlal_dist.experimenting.grid import (
    REFERENCE,
    Variant,
    ablation_rows,
    table1_rows,
    table2_rows,
)

METHOD = LossConfig()


def names(rows: list[Variant]) -> list[str]:
    return [row.name for row in rows]


def test_table1_is_in_the_papers_order_and_psl_has_a_prior() -> None:
    rows = table1_rows()
    assert names(rows) == [
        "ce_ignoring", "ce_negatifying", "asl_ignoring", "asl_negatifying", "psl", "selective",
    ]  # fmt: skip
    assert [row.prior for row in rows] == [None, None, None, None, "ce_ignoring", None]
    assert [row.overrides["method.loss"] for row in rows] == names(rows)


def test_table2_adds_nothing_all_and_the_configured_one() -> None:
    rows = table2_rows([20, 10, 20], "30")
    assert [row.label for row in rows] == ["0", "10", "20", "30", "all"]
    assert names(rows) == [
        "num_ignore-0", "num_ignore-10", "num_ignore-20", "selective", "num_ignore-all",
    ]  # fmt: skip
    assert names(table2_rows([10], "all")) == ["num_ignore-0", "num_ignore-10", "selective"]
    assert names(table2_rows([0], "0")) == ["selective", "num_ignore-all"]


@pytest.mark.parametrize(
    ("method", "temperature"),
    [
        (METHOD, 0.01),
        (
            LossConfig(
                num_ignore="all",
                margin=0.0,
                draw_over="unannotated",
                draw="top",
                draw_weights="uniform",
                detach_focal=False,
            ),
            0.5,
        ),
        (LossConfig(num_ignore=0, margin=0.1, draw_weights="cooccurrence"), 2.0),
    ],
)
def test_each_ablation_is_one_change_to_another_value(
    method: LossConfig, temperature: float
) -> None:
    own = {
        "method.margin": f"{method.margin:g}",
        "method.draw_over": method.draw_over,
        "method.draw": method.draw,
        "method.draw_weights": method.draw_weights,
        "method.detach_focal": str(method.detach_focal).lower(),
        "method.num_ignore": str(method.num_ignore),
        "scoring.temperature": repr(temperature),
    }
    first, *rows = ablation_rows(method, temperature)
    assert first.name == REFERENCE and dict(first.overrides) == {"method.loss": "selective"}
    for row in rows:
        ((key, value),) = (set(row.overrides.items())) - {("method.loss", "selective")}
        assert own[key] != value
    assert {key for row in rows for key in row.overrides} == {*own, "method.loss"}
    factors = [float(r.overrides["scoring.temperature"]) for r in rows if "temperature" in r.name]
    assert factors == pytest.approx([temperature * f for f in (0.25, 0.5, 2)])


def test_a_folder_is_one_run_in_all_tables() -> None:
    tables = [table1_rows(), table2_rows([10], "30"), ablation_rows(METHOD, 0.01)]
    for rows in tables:
        assert len(set(names(rows))) == len(rows)
    for one, other in itertools.combinations(itertools.chain(*tables), 2):
        if one.name == other.name:
            assert one.overrides == other.overrides


def test_all_overrides_are_settings() -> None:
    for row in [*table1_rows(), *table2_rows([10], "30"), *ablation_rows(METHOD, 0.01)]:
        assert load_config(None, row.overrides).method.loss == row.overrides["method.loss"]
