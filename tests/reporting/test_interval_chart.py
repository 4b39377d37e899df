"""The chart is well-formed SVG with everything inside its frame."""

import re
from xml.etree import ElementTree

from vlal_dist.reporting.interval_chart import HEIGHT, WIDTH, Point, draw_interval_curve

POINTS = [
    Point(0, "0", 50.0, 48.5, 51.0),
    Point(30, "30", 52.0, 51.0, 53.5, marked=True),
    Point(None, "<ALL>", 49.0, 47.0, 50.5),
]
TITLES = {"title": "a < b", "x_title": "x & y", "y_title": "mAP, %", "marked_title": "ours"}


def test_all_is_inside_and_escaped() -> None:
    text = draw_interval_curve(POINTS, **TITLES)
    root = ElementTree.fromstring(text)
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    found = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")]
    for wanted in ("a < b", "x & y", "mAP, %", "ours", "0", "30", "<ALL>"):
        assert wanted in found
    for name, limit in (("x1", WIDTH), ("x2", WIDTH), ("y1", HEIGHT), ("cx", WIDTH)):
        for value in re.findall(rf'{name}="([-\d.]+)"', text):
            assert 0 <= float(value) <= limit
    assert "style=" not in text and text.count("stroke-dasharray") == 1


def test_places_follow_the_values() -> None:
    root = ElementTree.fromstring(draw_interval_curve(POINTS, **TITLES))
    dots = [
        (float(node.get("cx", "")), float(node.get("cy", "")))
        for node in root.iter()
        if node.tag.endswith("circle")
    ][:3]
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    assert dots[1][1] < dots[0][1] < dots[2][1]  # higher is up


def test_one_point_equal_values_and_none() -> None:
    assert draw_interval_curve([], **TITLES) == ""
    for point in (Point(5, "5", 1, 1, 1), Point(None, "ALL", 1, 1, 1)):
        ElementTree.fromstring(draw_interval_curve([point], **TITLES))
