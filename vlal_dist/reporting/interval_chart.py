"""A chart of values with intervals as one self-contained SVG: axes, error bars, no library.

Colours are attributes of the elements, so that a page whose policy forbids inline styles shows it
as a viewer does.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlal_dist.reporting.training_curves import ticks

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 68, 28, 44, 58
INK, SOFT, GRID, ACCENT, MARKED = "#1a1f27", "#57606d", "#dde1e7", "#2456a6", "#b3471d"
CAP = 6
"""Half the width of an error bar's end."""
RING_OFFSET = 11
"""From an error bar to the single values beside it."""


@dataclass(frozen=True)
class Point:
    """One value.

    Attributes:
        x: place on the axis, or None: at the right end, apart from the numbers.
        label: under the axis.
        value, low, high: in the axis' unit.
        singles: the values behind a mean, drawn as rings.
        marked: drawn as the reference.
    """

    x: float | None
    label: str
    value: float
    low: float
    high: float
    singles: tuple[float, ...] = ()
    marked: bool = False


def draw_interval_curve(
    points: Sequence[Point], *, title: str, x_title: str, y_title: str, marked_title: str
) -> str:
    """The chart as SVG text; empty without a point.

    Args:
        points: by x; one without x comes last.
        title: heading, also the text alternative.
        x_title, y_title: of the axes.
        marked_title: what the marked point is, for the legend.
    """
    if not points:
        return ""
    low = min(min(point.low, *point.singles, point.value) for point in points)
    high = max(max(point.high, *point.singles, point.value) for point in points)
    margin = 0.08 * (high - low) or 0.5
    low, high = low - margin, high + margin
    numbers = [point.x for point in points if point.x is not None]
    first, last = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    apart = any(point.x is None for point in points)
    inner = WIDTH - LEFT - RIGHT - 2 * 24  # room for the bars at both ends
    share = 0.86 if apart and numbers else 1.0

    def place_x(point: Point) -> float:
        if point.x is None:
            return LEFT + 24 + inner
        at = (point.x - first) / (last - first) if last > first else 0.5
        return LEFT + 24 + at * share * inner

    def place_y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [*_frame(title, x_title, y_title), *_levels(low, high, place_y)]
    placed = [(place_x(point), point) for point in points]
    parts += _joints(placed, place_y)
    for x, point in placed:
        parts += _bar(x, point, place_y(point.value), place_y(point.low), place_y(point.high))
        parts += [_ring(x, place_y(single), point) for single in point.singles]
    if any(point.marked for point in points):
        parts += [
            f'<circle cx="{WIDTH - RIGHT - 8}" cy="{TOP - 18}" r="4.5" fill="{MARKED}"/>',
            _text(WIDTH - RIGHT - 18, TOP - 14, marked_title, SOFT, "end"),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _frame(title: str, x_title: str, y_title: str) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    name = html.escape(title)
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{name}" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{name}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="{TOP - 20}" fill="{INK}" font-size="14" font-weight="600">'
        f"{name}</text>",
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_title, INK, "middle"),
        f'<text transform="translate(18 {middle:g}) rotate(-90)" fill="{INK}" '
        f'text-anchor="middle">{html.escape(y_title)}</text>',
    ]


def _levels(low: float, high: float, place_y: Callable[[float], float]) -> list[str]:
    """Horizontal lines with their values, and the axis below."""
    parts = []
    for level in ticks(low, high):
        y = place_y(level)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, GRID, 1))
        parts.append(_text(LEFT - 10, y + 4, f"{level:g}", SOFT, "end"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, SOFT, 1))
    return parts


def _joints(placed: Sequence[tuple[float, Point]], place_y: Callable[[float], float]) -> list[str]:
    """Lines between neighbours; dashed to the one that stands apart."""
    parts = []
    for (x, one), (next_x, other) in pairwise(placed):
        dash = ' stroke-dasharray="5 5"' if other.x is None else ""
        y, next_y = place_y(one.value), place_y(other.value)
        parts.append(_line(x, y, next_x, next_y, ACCENT, 2, dash))
    return parts


def _bar(x: float, point: Point, y: float, low: float, high: float) -> list[str]:
    """Error bar, dot, and label under the axis."""
    colour = MARKED if point.marked else ACCENT
    axis = HEIGHT - BOTTOM
    said = html.escape(f"{point.label}: {point.value:.2f} ({point.low:.2f} to {point.high:.2f})")
    return [
        f"<g><title>{said}</title>",
        _line(x, low, x, high, colour, 1.5),
        _line(x - CAP, low, x + CAP, low, colour, 1.5),
        _line(x - CAP, high, x + CAP, high, colour, 1.5),
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/></g>',
        _line(x, axis, x, axis + 5, SOFT, 1),
        _text(x, axis + 20, point.label, INK if point.marked else SOFT, "middle"),
    ]


def _ring(x: float, y: float, point: Point) -> str:
    colour = MARKED if point.marked else ACCENT
    return (
        f'<circle cx="{x + RING_OFFSET:.1f}" cy="{y:.1f}" r="3" fill="none" stroke="{colour}" '
        'stroke-opacity="0.7"/>'
    )


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float, more: str = ""
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"{more}/>'
    )


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )
