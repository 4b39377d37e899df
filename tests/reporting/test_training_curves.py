"""metrics.jsonl to points and ticks."""

import json

import pytest

from vlal_dist.errors import DataError
from vlal_dist.reporting.training_curves import MAX_POINTS, draw_curve, read_metrics, series


def test_series_by_kind_later_line_wins_and_odd_values_are_left_out() -> None:
    text = "\n".join(
        json.dumps(line)
        for line in (
            {"kind": "train", "step": 20, "loss": 5.0, "ignored_effective": 3.5},
            {"kind": "validation", "epoch": 1, "step": 30, "mAP": 0.25},
            {"kind": "train", "step": 10, "loss": 9.0},
            {"kind": "train", "step": 20, "loss": 4.0},
            {"kind": "train", "step": 30, "loss": float("nan")},
            {"kind": "train", "step": 40},
        )
    )
    lines = read_metrics(text, where="m")
    assert series(lines, "train", "loss") == [(10, 9), (20, 4)]
    assert series(lines, "validation", "mAP") == [(30, 0.25)]
    assert series(lines, "train", "ignored_effective") == [(20, 3.5)]


def test_a_cut_last_line_is_left_out_another_is_an_error() -> None:
    assert read_metrics('{"a": 1}\n{"b": ', where="m") == [{"a": 1}]
    assert read_metrics("", where="m") == []
    with pytest.raises(DataError, match="m, line 1"):
        read_metrics('{"b": \n{"a": 1}\n', where="m")
    with pytest.raises(DataError, match="no JSON object"):
        read_metrics("[1]\n{}\n", where="m")


def test_points_lie_in_the_frame_and_ticks_are_round() -> None:
    curve = draw_curve([(0, 0.1), (50, 0.4), (100, 0.3)], title="t", percent=True)
    assert curve is not None
    assert [mark[0] for mark in curve.marks] == [curve.left, 282.0, curve.right]
    assert curve.marks[0][1] == curve.bottom and curve.marks[1][1] == curve.top
    assert [text for _, text in curve.y_ticks] == ["10", "20", "30", "40"]
    assert [text for _, text in curve.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert curve.summary == "10 at step 0, 30 at step 100; best 40 at step 50"


def test_no_point_one_point_and_a_flat_line() -> None:
    assert draw_curve([], title="t", percent=False) is None
    for points in ([(0.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]):
        curve = draw_curve(points, title="t", percent=False)
        assert curve is not None and len(curve.marks) == len(points)


def test_many_points_are_averaged_and_it_is_said() -> None:
    curve = draw_curve([(x, float(x)) for x in range(10_500)], title="t", percent=False)
    assert curve is not None
    assert len(curve.points.split()) <= MAX_POINTS
    assert "mean of 11 logged values" in curve.summary
    assert curve.marks == []
