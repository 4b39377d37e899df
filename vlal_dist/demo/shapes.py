"""The twelve kinds of objects, drawn as parts on a canvas.

Each function fills the canvas from y = -1 to 1 and x = -aspect to aspect, standing upright.
"""

from collections.abc import Callable

import numpy as np

from vlal_dist.demo.canvas import BODY, GLOW, HOLE, PAPER, TRIM, WINDOW, Canvas, Field
from vlal_dist.demo.world import Traits


def draw_ball(c: Canvas, t: Traits) -> None:
    """A sphere."""
    inside = c.ellipse((0, 0), (c.aspect, 1.0))
    depth = np.sqrt(np.maximum(1 - inside, 0.0))
    c.paint(
        inside < 1,
        BODY,
        normal=(c.x / c.aspect, c.y),
        surface=(np.arctan2(c.x, depth + 0.15) * 0.8, np.arctan2(c.y + 0.2, depth + 0.15) * 0.8),
    )


def draw_mug(c: Canvas, t: Traits) -> None:
    """A cup with a handle."""
    reach = 0.42 * c.aspect
    half = c.aspect - reach / 2
    axis, top = half - c.aspect, -1 + 0.22 * half
    ring = np.sqrt(c.ellipse((axis + half - 0.02, 0.05), (reach, 0.5)))
    bend = (ring - 0.83) / 0.17
    c.paint(np.abs(bend) < 1, BODY, normal=(bend * 0.7, bend * 0.4))
    angular = t.form == "angular"
    radius = half * (0.9 - 0.1 * c.y) if angular else half * (0.94 - 0.06 * c.y)
    c.turned(radius, top, 1.0, center=axis, angular=angular, bulge=0.2)
    flat = 0.22 * half
    c.paint(c.ellipse((axis, top), (half * 0.99, flat)) < 1, BODY, normal=(0, -0.7), shade=1.1)
    c.paint(c.ellipse((axis, top + 0.01), (half * 0.87, flat * 0.82)) < 1, HOLE)


def draw_vase(c: Canvas, t: Traits) -> None:
    """A belly with a mouth."""
    a = c.aspect
    s = (c.y + 1) / 2  # 0 at the mouth, 1 at the foot
    if t.form == "round":
        profile = (
            0.42 + 0.58 * np.sin(np.pi * np.clip(s * 1.05 - 0.12, 0, 1)) ** 2 + 0.12 * (s < 0.06)
        )
        slope: Field | float = 0.45 * np.cos(np.pi * np.clip(s * 1.05 - 0.12, 0, 1)) * -1
    else:
        profile = np.where(s < 0.55, 0.48 + 0.95 * s, 1.0 - 0.9 * (s - 0.55))
        slope = np.where(s < 0.55, -0.35, 0.3).astype(np.float32)
    radius = (a * np.clip(profile, 0.1, 1.0)).astype(np.float32)
    mouth = 0.44 * a
    c.turned(radius, -1 + 0.25 * mouth, 1.0, angular=t.form == "angular", slope=slope)
    c.paint(
        c.ellipse((0, -1 + 0.25 * mouth), (mouth, 0.25 * mouth)) < 1,
        BODY,
        normal=(0, -0.7),
        shade=1.1,
    )
    c.paint(c.ellipse((0, -1 + 0.27 * mouth), (mouth * 0.84, 0.2 * mouth)) < 1, HOLE)


def draw_plate(c: Canvas, t: Traits) -> None:
    """A rim around a flat middle."""
    a = c.aspect
    power = 2.0 if t.form == "round" else 6.0

    def inside(scale: float, drop: float) -> Field:
        across = np.abs(c.x / (a * scale)) ** power + np.abs((c.y - drop) / scale) ** power
        return np.asarray(across, dtype=np.float32)

    flat = (c.x, c.y * a)
    thick = 0.1 if a > 1.3 else 0.03
    c.paint(inside(0.985, 0.015) < 1, BODY, normal=(c.x / a * 0.8, 0.7), shade=0.75)
    c.paint(
        inside(0.97, -thick * 0.3) < 1,
        BODY,
        normal=(c.x / a * 0.5, -0.25 + 0.3 * c.y),
        surface=flat,
    )
    c.paint(
        inside(0.7, 0.0) < 1,
        BODY,
        normal=(-c.x / a * 0.6, -0.3 - 0.3 * c.y),
        surface=flat,
        shade=0.8,
    )
    c.paint(inside(0.64, 0.02) < 1, BODY, normal=(c.x * 0.08, -0.3), surface=flat)


def draw_bottle(c: Canvas, t: Traits) -> None:
    """A body, a neck, perhaps a cap."""
    a = c.aspect
    neck, shoulder = -0.45, -0.1
    ease = np.clip((c.y - neck) / (shoulder - neck), 0, 1)
    swell = ease * ease * (3 - 2 * ease) if t.form == "round" else ease
    radius = (a * (0.36 + 0.64 * swell)).astype(np.float32)
    top = -0.82 if "closed" in t.states else -0.95
    c.turned(radius, top, 1.0, angular=t.form == "angular", bulge=0.12)
    label = (np.abs(c.x) < radius) & (c.y > 0.15) & (c.y < 0.62)
    np.copyto(c.shade, 1.12, where=label)
    if "closed" in t.states:
        c.turned(np.full_like(c.x, 0.42 * a), -0.98, -0.74, angular=False, role=TRIM)
        c.paint(c.ellipse((0, -0.96), (0.42 * a, 0.04)) < 1, TRIM, normal=(0, -0.8), shade=1.3)
    else:
        c.paint(c.ellipse((0, -0.94), (0.4 * a, 0.06)) < 1, BODY, normal=(0, -0.7), shade=1.2)
        c.paint(c.ellipse((0, -0.94), (0.28 * a, 0.04)) < 1, HOLE)


def draw_object(canvas: Canvas, traits: Traits) -> None:
    """Build the object that `traits` describes."""
    _DRAW[traits.kind](canvas, traits)


def _box(c: Canvas, t: Traits) -> None:
    a, deep = c.aspect, min(0.42, 0.5 * c.aspect)
    lift = 0.5 * deep + (0.12 if "open" in t.states else 0.0)
    left, right, top = -a, a - deep, -1 + lift
    if "open" in t.states:
        back = [(left + deep, -1 + 0.12), (a, -1 + 0.12), (right, top), (left, top)]
        c.paint(c.polygon(back), HOLE)
        c.paint(
            c.polygon([back[0], back[1], (a, top + 0.1), (left + deep, top + 0.1)]), BODY, shade=0.5
        )
        c.paint(c.polygon([back[3], back[0], (left + deep, top), (left, top)]), BODY, shade=0.6)
        # Two flaps stand up at the back and hang over the front edge.
        c.paint(
            c.polygon([(left + deep, -1), (a, -1), (a - 0.06, -0.88), (left + deep, -0.88)]),
            BODY,
            normal=(0, -0.5),
            shade=1.1,
        )
    else:
        lid = [(left + deep, -1), (a, -1), (right, top), (left, top)]
        skew = (c.x + (c.y - top) * deep / lift, (c.y - top) * deep / lift)
        c.paint(c.polygon(lid), BODY, normal=(0.05, -0.85), surface=skew)
    side = [(right, top), (a, -1 + lift - 0.5 * deep), (a, 1 - 0.5 * deep), (right, 1)]
    c.paint(c.polygon(side), BODY, normal=(0.85, 0.05), surface=(c.x, c.y + (c.x - right) * 0.5))
    c.paint(c.rectangle(left, top, right, 1), BODY, normal=(-0.25 + 0.1 * c.x, 0.1))
    if "open" in t.states:
        c.paint(
            c.polygon(
                [(left, top), (right, top), (right - 0.05, top + 0.2), (left + 0.05, top + 0.2)]
            ),
            BODY,
            normal=(0, -0.6),
            shade=1.12,
        )
        c.paint(c.rectangle(left + 0.03, top + 0.2, right - 0.03, top + 0.235), BODY, shade=0.6)


def _chair(c: Canvas, t: Traits) -> None:
    a, leg = c.aspect, 0.11
    seat = 0.12
    for x, end in ((-0.55, 0.86), (0.8, 0.86)):
        c.bar((x * a, seat), (x * a, end), leg * 0.9, BODY, 0.6)
    back_left, back_right = -a * 0.72, a * 0.72
    if t.form == "round":
        oval = c.ellipse((0, -0.5), (a * 0.74, 0.5))
        c.paint((oval < 1) & (c.y < seat), BODY, normal=(c.x / a * 0.5, c.y * 0.3))
        c.bar((back_left * 0.6, -0.2), (back_left * 0.6, seat), leg, BODY, 0.85)
        c.bar((back_right * 0.6, -0.2), (back_right * 0.6, seat), leg, BODY, 0.85)
        disc = c.ellipse((0, seat), (a, 0.2))
        c.paint(c.ellipse((0, seat + 0.08), (a, 0.2)) < 1, BODY, shade=0.6)
        c.paint(disc < 1, BODY, normal=(0, -0.8), surface=(c.x, c.y * 2.5), shade=1.1)
    else:
        c.bar((back_left, -1 + leg / 3), (back_left, seat), leg, BODY, 0.9)
        c.bar((back_right, -1 + leg / 3), (back_right, seat), leg, BODY, 0.9)
        c.paint(c.rectangle(back_left, -0.95, back_right, -0.38), BODY, normal=(0.15 * c.x, -0.05))
        c.paint(c.rectangle(back_left, -0.24, back_right, -0.12), BODY, shade=0.9)
        slab = [
            (back_left, seat - 0.16),
            (back_right, seat - 0.16),
            (a, seat + 0.14),
            (-a, seat + 0.14),
        ]
        c.paint(c.polygon(slab), BODY, normal=(0, -0.8), surface=(c.x, c.y * 2.5), shade=1.1)
        c.paint(c.rectangle(-a, seat + 0.14, a, seat + 0.25), BODY, shade=0.7)
    for x in (-0.9, 0.9):
        c.bar((x * a, seat + 0.2), (x * a, 1 - leg / 3), leg, BODY, 0.95)


def _lamp(c: Canvas, t: Traits) -> None:
    a = c.aspect
    c.bar((0, -0.2), (0, 0.9), 0.1, TRIM)
    c.paint(c.ellipse((0, 0.93), (a * 0.62, 0.07)) < 1, TRIM, normal=(c.x, -0.5))
    c.paint(c.ellipse((0, 0.88), (a * 0.55, 0.08)) < 1, TRIM, normal=(c.x * 0.5, -0.7), shade=1.2)
    if t.form == "round":
        arch = np.sqrt(np.clip(1 - ((c.y - 0.0) / 1.0) ** 2, 0, 1))
        shade = (a * arch).astype(np.float32)
    else:
        shade = (a * np.clip(0.45 + 0.55 * (c.y + 1), 0.1, 1)).astype(np.float32)
    lit = "lit" in t.states
    if lit:
        c.paint(c.ellipse((0, 0.02), (a * 0.3, 0.15)) < 1, GLOW)
    c.turned(shade, -1.0, 0.0, angular=False, bulge=-0.12, slope=-0.3, role=BODY)
    if lit:
        # Light shines through the shade, most where the bulb is.
        heat = np.exp(-2.2 * c.ellipse((0, -0.3), (a, 0.7)))
        np.copyto(c.shade, 1.25 + 1.5 * heat, where=(c.role == BODY))
    else:
        c.paint((c.ellipse((0, 0.0), (a * 0.98, 0.09)) < 1) & (c.y > 0.01), HOLE)


def _car(c: Canvas, t: Traits) -> None:
    a = c.aspect
    wheel, floor = 0.3, 0.62
    if t.form == "round":
        cabin = c.ellipse((-0.1 * a, 0.0), (0.62 * a, 1.0))
        hull = np.abs(c.x / a) ** 4 + np.abs((c.y - 0.28) / 0.4) ** 4
        body = ((cabin < 1) & (c.y < 0.2)) | (hull < 1)
        pane = (c.ellipse((-0.1 * a, 0.0), (0.52 * a, 0.82)) < 1) & (c.y < -0.08)
    else:
        roof = [(-0.5 * a, -1.0), (0.25 * a, -1.0), (0.52 * a, 0.0), (-0.75 * a, 0.0)]
        body = c.polygon(roof) | c.rectangle(-a, -0.08, a, floor)
        pane = c.polygon(
            [(-0.45 * a, -0.84), (0.2 * a, -0.84), (0.42 * a, -0.1), (-0.62 * a, -0.1)]
        )
    c.paint(c.rectangle(-0.85 * a, 0.45, 0.85 * a, floor + 0.14), HOLE)
    c.paint(body & (c.y < floor + 0.05), BODY, normal=(0.2 * c.x / a, (c.y - 0.1) * 0.7))
    c.paint(pane & (np.abs(c.x + 0.08 * a) > 0.035), WINDOW, normal=(0.3, -0.3))
    c.paint(c.rectangle(-0.08 * a - 0.012, -0.05, -0.08 * a + 0.012, floor), BODY, shade=0.6)
    for x in (-0.58 * a, 0.58 * a):
        c.paint(c.ellipse((x, 1 - wheel), (wheel, wheel)) < 1, HOLE, shade=1.3)
        c.paint(c.ellipse((x, 1 - wheel), (wheel * 0.55, wheel * 0.55)) < 1, TRIM, shade=1.6)
    lamp = GLOW if "lit" in t.states else TRIM
    c.paint(c.ellipse((0.93 * a, 0.17), (0.1, 0.13)) < 1, lamp, shade=1.3)
    c.paint(c.rectangle(-a, 0.1, -a + 0.07, 0.28) & body, TRIM, shade=0.8)


def _hat(c: Canvas, t: Traits) -> None:
    a = c.aspect
    brim = 0.26
    c.paint(
        c.ellipse((0, 1 - brim), (a, brim)) < 1,
        BODY,
        normal=(c.x / a * 0.4, -0.55),
        surface=(c.x, c.y * 2),
    )
    c.paint((c.ellipse((0, 1 - brim - 0.06), (a, brim)) > 1) & (c.role == BODY), BODY, shade=0.7)
    if t.form == "round":
        dome = np.sqrt(np.clip(1 - ((c.y - 0.75) / 1.75) ** 2, 0, 1))
        crown = (0.62 * a * dome).astype(np.float32)
        c.turned(crown, -1.0, 0.8, angular=False, bulge=0.3, slope=-0.35 + 0.2 * c.y)
    else:
        crown = (0.62 * a * (0.86 + 0.08 * c.y)).astype(np.float32)
        c.turned(crown, -0.85, 0.8, angular=False, bulge=0.3)
        c.paint(c.ellipse((0, -0.85), (0.49 * a, 0.15)) < 1, BODY, normal=(0, -0.8), shade=1.1)
    sag = 0.3 * crown * (np.sqrt(np.maximum(1 - (c.x / np.maximum(crown, 1e-3)) ** 2, 0)) - 1)
    band = (np.abs(c.x) < crown) & (c.y > 0.42 + sag) & (c.y < 0.66 + sag)
    c.paint(band, TRIM, normal=(c.x / (0.62 * a), 0.0))


def _book(c: Canvas, t: Traits) -> None:
    a = c.aspect
    if "open" in t.states:
        curve = 0.16 * np.abs(np.sin(np.pi * np.clip(np.abs(c.x) / a, 0, 1))) ** 0.8
        cover = c.rectangle(-a, -0.84, a, 1.0)
        c.paint(cover, BODY, normal=(0, -0.2))
        page = (np.abs(c.x) < a * 0.94) & (c.y > -0.84 - curve) & (c.y < 0.88 - curve)
        c.paint(page, PAPER, normal=(np.sign(c.x) * (0.35 - np.abs(c.x) / a * 0.5), -0.3))
        lines = page & (np.abs(c.x) > 0.12 * a) & (np.abs(c.x) < 0.82 * a)
        row = np.mod((c.y + curve) * 6.5, 1.0)
        c.paint(lines & (row < 0.28) & (c.y > -0.7) & (c.y < 0.65), PAPER, shade=0.55)
        c.paint(page & (np.abs(c.x) < 0.03 * a), PAPER, shade=0.5)
        return
    c.paint(
        c.polygon([(-a + 0.1, -1), (a, -1), (a, 0.93), (a - 0.1, 1), (-a + 0.1, 1)]),
        BODY,
        shade=0.6,
    )
    c.paint(c.rectangle(-a + 0.12, -0.93, a - 0.01, 0.96), PAPER, shade=0.9)
    c.paint(c.rectangle(-a, -0.97, a - 0.1, 0.93), BODY, normal=(0.06 * c.x, -0.1))
    c.paint(c.rectangle(-a, -0.97, -a + 0.14, 0.93), BODY, normal=(-0.6, 0), shade=0.75)
    c.paint(c.rectangle(-a + 0.3 * a, -0.65, a - 0.4 * a, -0.4), PAPER, shade=0.95)


def _leaf(c: Canvas, t: Traits) -> None:
    a = c.aspect
    s = np.clip((c.y + 1) / 1.72, 0, 1)  # 0 at the tip, 1 where the stalk begins
    if t.form == "round":
        width = a * np.maximum(np.sin(np.pi * s**0.85), 0) ** 0.75
    else:
        width = (
            a
            * np.maximum(np.sin(np.pi * s**0.8), 0)
            * (0.72 + 0.28 * np.abs(2 * np.mod(s * 4.0, 1.0) - 1))
        )
    half = np.maximum(width.astype(np.float32), 1e-3)
    across = c.x / half
    inside = (np.abs(across) < 1) & (c.y > -1) & (c.y < 0.72)
    c.bar((0.02, 0.6), (0.1, 0.98), 0.06, BODY, 0.6)
    fold = np.where(c.x > 0, 0.3, -0.35) + 0.25 * across
    c.paint(inside, BODY, normal=(fold.astype(np.float32), -0.15))
    rib = np.abs(np.mod((c.y + 0.55 * np.abs(c.x) / a * a) * 4.2, 1.0) - 0.5) < 0.06
    c.paint(inside & (rib | (np.abs(c.x) < 0.025)), BODY, normal=(0.0, -0.2), shade=1.3)


_DRAW: dict[str, Callable[[Canvas, Traits], None]] = {
    "ball": draw_ball,
    "box": _box,
    "mug": draw_mug,
    "vase": draw_vase,
    "plate": draw_plate,
    "chair": _chair,
    "lamp": _lamp,
    "bottle": draw_bottle,
    "car": _car,
    "hat": _hat,
    "book": _book,
    "leaf": _leaf,
}
