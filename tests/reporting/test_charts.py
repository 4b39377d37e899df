"""Charts: positions inside the frame, round ticks, well-formed SVG."""

import re
from xml.etree import ElementTree

from vlal_dist.reporting.charts import (
    INTERVAL_FRAME,
    MAX_POINTS,
    TRAINING_FRAME,
    IntervalChart,
    IntervalPoint,
    draw_curve,
)
from vlal_dist.reporting.page import render_chart

WIDTH, HEIGHT = INTERVAL_FRAME.width, INTERVAL_FRAME.height
POINTS = [
    IntervalPoint(0, "0", 50.0, 48.5, 51.0),
    IntervalPoint(30, "30", 52.0, 51.0, 53.5, marked=True),
    IntervalPoint(None, "<ALL>", 49.0, 47.0, 50.5),
]
TITLE = "a < b"


def draw(points: list[IntervalPoint]) -> str:
    return render_chart(IntervalChart(TITLE, points))


def test_all_is_inside_and_escaped() -> None:
    text = draw(POINTS)
    root = ElementTree.fromstring(text)
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    found = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")]
    for wanted in (TITLE, "test mAP, % (95 % over photos)", "as configured", "0", "30", "<ALL>"):
        assert wanted in found
    for name, limit in (("x1", WIDTH), ("x2", WIDTH), ("y1", HEIGHT), ("cx", WIDTH)):
        for value in re.findall(rf'{name}="([-\d.]+)"', text):
            assert 0 <= float(value) <= limit
    assert "style=" not in text and text.count("stroke-dasharray") == 1


def test_places_follow_the_values() -> None:
    root = ElementTree.fromstring(draw(POINTS))
    dots = [
        (float(node.get("cx", "")), float(node.get("cy", "")))
        for node in root.iter()
        if node.tag.endswith("circle")
    ][:3]
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    assert dots[1][1] < dots[0][1] < dots[2][1]  # higher is up


def test_one_point_and_equal_values() -> None:
    for point in (IntervalPoint(5, "5", 1, 1, 1), IntervalPoint(None, "ALL", 1, 1, 1)):
        ElementTree.fromstring(draw([point]))


def test_points_lie_in_the_frame_and_ticks_are_round() -> None:
    curve = draw_curve([(0, 0.1), (50, 0.4), (100, 0.3)], title="t", is_share=True)
    assert curve is not None
    assert [mark[0] for mark in curve.marks] == [TRAINING_FRAME.left, 282.0, TRAINING_FRAME.right]
    assert curve.marks[0][1] == TRAINING_FRAME.bottom
    assert curve.marks[1][1] == TRAINING_FRAME.top
    assert [text for _, text in curve.y_ticks] == ["10", "20", "30", "40"]
    assert [text for _, text in curve.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert curve.notes == ["10 at step 0, 30 at step 100; best 40 at step 50"]


def test_no_point_one_point_and_a_flat_line() -> None:
    assert draw_curve([], title="t", is_share=False) is None
    for points in ([(0.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]):
        curve = draw_curve(points, title="t", is_share=False)
        assert curve is not None and len(curve.marks) == len(points)


def test_many_points_are_averaged_and_the_note_says_so() -> None:
    curve = draw_curve([(x, float(x)) for x in range(10_500)], title="t", is_share=False)
    assert curve is not None
    assert len(curve.path.split()) <= MAX_POINTS
    assert "mean of 11 logged values" in curve.notes[0]
    assert curve.marks == []
