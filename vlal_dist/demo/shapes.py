"""The twelve kinds of objects, drawn as parts on a canvas.

Each function fills the canvas from y = -1 to 1 and x = -aspect to aspect, standing upright. `c` is
the canvas, `t` the traits, `a` the aspect.
"""

from typing import Any

import numpy as np

from vlal_dist.demo.canvas import BODY, GLOW, HOLE, PAPER, TRIM, WINDOW, Canvas, Field
from vlal_dist.demo.world import Traits


def ball(c: Canvas, t: Traits) -> None:
    """A sphere."""
    inside = c.ellipse((0, 0), (c.aspect, 1.0))
    depth = np.sqrt(np.maximum(1 - inside, 0.0))
    c.paint(
        inside < 1,
        normal=(c.x / c.aspect, c.y),
        surface=(np.arctan2(c.x, depth + 0.15) * 0.8, np.arctan2(c.y + 0.2, depth + 0.15) * 0.8),
    )


def mug(c: Canvas, t: Traits) -> None:
    """A cup with a handle."""
    reach = 0.42 * c.aspect
    half = c.aspect - reach / 2
    axis, top = half - c.aspect, -1 + 0.22 * half
    ring = np.sqrt(c.ellipse((axis + half - 0.02, 0.05), (reach, 0.5)))
    bend = (ring - 0.83) / 0.17
    c.paint(np.abs(bend) < 1, normal=(bend * 0.7, bend * 0.4))
    angular = t.form == "angular"
    radius = half * (0.9 - 0.1 * c.y) if angular else half * (0.94 - 0.06 * c.y)
    c.turned(radius, top, center=axis, angular=angular, bulge=0.2)
    flat = 0.22 * half
    c.disc((axis, top), (half * 0.99, flat), normal=(0, -0.7), shade=1.1)
    c.disc((axis, top + 0.01), (half * 0.87, flat * 0.82), HOLE)


def vase(c: Canvas, t: Traits) -> None:
    """A belly with a mouth."""
    a = c.aspect
    s = (c.y + 1) / 2  # 0 at the mouth, 1 at the foot
    if t.form == "round":
        wave = np.pi * np.clip(s * 1.05 - 0.12, 0, 1)
        profile = 0.42 + 0.58 * np.sin(wave) ** 2 + 0.12 * (s < 0.06)
        slope: Field | float = 0.45 * np.cos(wave) * -1
    else:
        profile = np.where(s < 0.55, 0.48 + 0.95 * s, 1.0 - 0.9 * (s - 0.55))
        slope = np.where(s < 0.55, -0.35, 0.3).astype(np.float32)
    radius = (a * np.clip(profile, 0.1, 1.0)).astype(np.float32)
    mouth = 0.44 * a
    c.turned(radius, -1 + 0.25 * mouth, angular=t.form == "angular", slope=slope)
    c.disc((0, -1 + 0.25 * mouth), (mouth, 0.25 * mouth), normal=(0, -0.7), shade=1.1)
    c.disc((0, -1 + 0.27 * mouth), (mouth * 0.84, 0.2 * mouth), HOLE)


def plate(c: Canvas, t: Traits) -> None:
    """A rim around a flat middle."""
    a, x = c.aspect, c.x / c.aspect
    power = 2.0 if t.form == "round" else 6.0
    thick = 0.1 if a > 1.3 else 0.03
    own, flat = (c.x, c.y), (c.x, c.y * a)
    for scale, drop, normal, surface, shade in (
        (0.985, 0.015, (x * 0.8, 0.7), own, 0.75),
        (0.97, -thick * 0.3, (x * 0.5, -0.25 + 0.3 * c.y), flat, 1.0),
        (0.7, 0.0, (-c.x / a * 0.6, -0.3 - 0.3 * c.y), flat, 0.8),
        (0.64, 0.02, (c.x * 0.08, -0.3), flat, 1.0),
    ):
        far = np.abs(c.x / (a * scale)) ** power + np.abs((c.y - drop) / scale) ** power
        c.paint(far.astype(np.float32) < 1, normal=normal, surface=surface, shade=shade)


def bottle(c: Canvas, t: Traits) -> None:
    """A body, a neck, perhaps a cap."""
    a = c.aspect
    neck, shoulder = -0.45, -0.1
    ease = np.clip((c.y - neck) / (shoulder - neck), 0, 1)
    swell = ease * ease * (3 - 2 * ease) if t.form == "round" else ease
    radius = (a * (0.36 + 0.64 * swell)).astype(np.float32)
    closed = "closed" in t.states
    c.turned(radius, -0.82 if closed else -0.95, angular=t.form == "angular", bulge=0.12)
    label = (np.abs(c.x) < radius) & (c.y > 0.15) & (c.y < 0.62)
    np.copyto(c.shade, 1.12, where=label)
    if closed:
        c.turned(np.full_like(c.x, 0.42 * a), -0.98, -0.74, role=TRIM)
        c.disc((0, -0.96), (0.42 * a, 0.04), TRIM, normal=(0, -0.8), shade=1.3)
    else:
        c.disc((0, -0.94), (0.4 * a, 0.06), normal=(0, -0.7), shade=1.2)
        c.disc((0, -0.94), (0.28 * a, 0.04), HOLE)


def box(c: Canvas, t: Traits) -> None:
    """A cuboid seen from its corner, with or without a lid."""
    a, deep = c.aspect, min(0.42, 0.5 * c.aspect)
    opened = "open" in t.states
    lift = 0.5 * deep + (0.12 if opened else 0.0)
    left, right, top = -a, a - deep, -1 + lift
    rear = left + deep
    if opened:
        c.paint(c.polygon((rear, -1 + 0.12), (a, -1 + 0.12), (right, top), (left, top)), HOLE)
        inside = c.polygon((rear, -1 + 0.12), (a, -1 + 0.12), (a, top + 0.1), (rear, top + 0.1))
        c.paint(inside, shade=0.5)
        c.paint(c.polygon((left, top), (rear, -1 + 0.12), (rear, top), (left, top)), shade=0.6)
        # Two flaps stand up at the back and hang over the front edge.
        flap = c.polygon((rear, -1), (a, -1), (a - 0.06, -0.88), (rear, -0.88))
        c.paint(flap, normal=(0, -0.5), shade=1.1)
    else:
        lid = c.polygon((rear, -1), (a, -1), (right, top), (left, top))
        skew = (c.x + (c.y - top) * deep / lift, (c.y - top) * deep / lift)
        c.paint(lid, normal=(0.05, -0.85), surface=skew)
    side = c.polygon((right, top), (a, -1 + lift - 0.5 * deep), (a, 1 - 0.5 * deep), (right, 1))
    c.paint(side, normal=(0.85, 0.05), surface=(c.x, c.y + (c.x - right) * 0.5))
    c.block((left, top, right, 1), normal=(-0.25 + 0.1 * c.x, 0.1))
    if opened:
        edge = top + 0.2
        flap = c.polygon((left, top), (right, top), (right - 0.05, edge), (left + 0.05, edge))
        c.paint(flap, normal=(0, -0.6), shade=1.12)
        c.block((left + 0.03, edge, right - 0.03, top + 0.235), shade=0.6)


def chair(c: Canvas, t: Traits) -> None:
    """Four legs, a seat, a back."""
    a, leg, seat = c.aspect, 0.11, 0.12
    for x in (-0.55, 0.8):
        c.bar((x * a, seat), (x * a, 0.86), leg * 0.9, 0.6)
    left, right = -a * 0.72, a * 0.72
    flat: dict[str, Any] = {"normal": (0, -0.8), "surface": (c.x, c.y * 2.5), "shade": 1.1}
    if t.form == "round":
        oval = c.ellipse((0, -0.5), (a * 0.74, 0.5))
        c.paint((oval < 1) & (c.y < seat), normal=(c.x / a * 0.5, c.y * 0.3))
        for x in (left, right):
            c.bar((x * 0.6, -0.2), (x * 0.6, seat), leg, 0.85)
        c.disc((0, seat + 0.08), (a, 0.2), shade=0.6)
        c.disc((0, seat), (a, 0.2), **flat)
    else:
        for x in (left, right):
            c.bar((x, -1 + leg / 3), (x, seat), leg, 0.9)
        c.block((left, -0.95, right, -0.38), normal=(0.15 * c.x, -0.05))
        c.block((left, -0.24, right, -0.12), shade=0.9)
        near, far = seat + 0.14, seat - 0.16
        c.paint(c.polygon((left, far), (right, far), (a, near), (-a, near)), **flat)
        c.block((-a, near, a, seat + 0.25), shade=0.7)
    for x in (-0.9, 0.9):
        c.bar((x * a, seat + 0.2), (x * a, 1 - leg / 3), leg, 0.95)


def lamp(c: Canvas, t: Traits) -> None:
    """A shade on a stand."""
    a, lit = c.aspect, "lit" in t.states
    c.bar((0, -0.2), (0, 0.9), 0.1, role=TRIM)
    c.disc((0, 0.93), (a * 0.62, 0.07), TRIM, normal=(c.x, -0.5))
    c.disc((0, 0.88), (a * 0.55, 0.08), TRIM, normal=(c.x * 0.5, -0.7), shade=1.2)
    if t.form == "round":
        width = np.sqrt(np.clip(1 - c.y**2, 0, 1))
    else:
        width = np.clip(0.45 + 0.55 * (c.y + 1), 0.1, 1)
    if lit:
        c.disc((0, 0.02), (a * 0.3, 0.15), GLOW)
    c.turned((a * width).astype(np.float32), -1.0, 0.0, bulge=-0.12, slope=-0.3)
    if lit:
        # Light shines through the shade, most where the bulb is.
        heat = np.exp(-2.2 * c.ellipse((0, -0.3), (a, 0.7)))
        np.copyto(c.shade, 1.25 + 1.5 * heat, where=(c.role == BODY))
    else:
        c.paint((c.ellipse((0, 0.0), (a * 0.98, 0.09)) < 1) & (c.y > 0.01), HOLE)


def car(c: Canvas, t: Traits) -> None:
    """A car from the side."""
    a, wheel, floor = c.aspect, 0.3, 0.62
    if t.form == "round":
        cabin = c.ellipse((-0.1 * a, 0.0), (0.62 * a, 1.0))
        hull = np.abs(c.x / a) ** 4 + np.abs((c.y - 0.28) / 0.4) ** 4
        body = ((cabin < 1) & (c.y < 0.2)) | (hull < 1)
        pane = (c.ellipse((-0.1 * a, 0.0), (0.52 * a, 0.82)) < 1) & (c.y < -0.08)
    else:
        roof = c.polygon((-0.5 * a, -1.0), (0.25 * a, -1.0), (0.52 * a, 0.0), (-0.75 * a, 0.0))
        body = roof | c.rectangle(-a, -0.08, a, floor)
        high, low = -0.84, -0.1
        pane = c.polygon((-0.45 * a, high), (0.2 * a, high), (0.42 * a, low), (-0.62 * a, low))
    c.block((-0.85 * a, 0.45, 0.85 * a, floor + 0.14), HOLE)
    c.paint(body & (c.y < floor + 0.05), normal=(0.2 * c.x / a, (c.y - 0.1) * 0.7))
    c.paint(pane & (np.abs(c.x + 0.08 * a) > 0.035), WINDOW, normal=(0.3, -0.3))
    c.block((-0.08 * a - 0.012, -0.05, -0.08 * a + 0.012, floor), shade=0.6)
    for x in (-0.58 * a, 0.58 * a):
        c.disc((x, 1 - wheel), (wheel, wheel), HOLE, shade=1.3)
        c.disc((x, 1 - wheel), (wheel * 0.55, wheel * 0.55), TRIM, shade=1.6)
    c.disc((0.93 * a, 0.17), (0.1, 0.13), GLOW if "lit" in t.states else TRIM, shade=1.3)
    c.paint(c.rectangle(-a, 0.1, -a + 0.07, 0.28) & body, TRIM, shade=0.8)


def hat(c: Canvas, t: Traits) -> None:
    """A crown with a band on a brim."""
    a, brim = c.aspect, 0.26
    c.disc((0, 1 - brim), (a, brim), normal=(c.x / a * 0.4, -0.55), surface=(c.x, c.y * 2))
    c.paint((c.ellipse((0, 1 - brim - 0.06), (a, brim)) > 1) & (c.role == BODY), shade=0.7)
    if t.form == "round":
        dome = np.sqrt(np.clip(1 - ((c.y - 0.75) / 1.75) ** 2, 0, 1))
        crown = (0.62 * a * dome).astype(np.float32)
        c.turned(crown, -1.0, 0.8, bulge=0.3, slope=-0.35 + 0.2 * c.y)
    else:
        crown = (0.62 * a * (0.86 + 0.08 * c.y)).astype(np.float32)
        c.turned(crown, -0.85, 0.8, bulge=0.3)
        c.disc((0, -0.85), (0.49 * a, 0.15), normal=(0, -0.8), shade=1.1)
    sag = 0.3 * crown * (np.sqrt(np.maximum(1 - (c.x / np.maximum(crown, 1e-3)) ** 2, 0)) - 1)
    band = (np.abs(c.x) < crown) & (c.y > 0.42 + sag) & (c.y < 0.66 + sag)
    c.paint(band, TRIM, normal=(c.x / (0.62 * a), 0.0))


def book(c: Canvas, t: Traits) -> None:
    """A book lying open, or its front."""
    a = c.aspect
    if "open" in t.states:
        curve = 0.16 * np.abs(np.sin(np.pi * np.clip(np.abs(c.x) / a, 0, 1))) ** 0.8
        c.block((-a, -0.84, a, 1.0), normal=(0, -0.2))
        page = (np.abs(c.x) < a * 0.94) & (c.y > -0.84 - curve) & (c.y < 0.88 - curve)
        c.paint(page, PAPER, normal=(np.sign(c.x) * (0.35 - np.abs(c.x) / a * 0.5), -0.3))
        lines = page & (np.abs(c.x) > 0.12 * a) & (np.abs(c.x) < 0.82 * a)
        row = np.mod((c.y + curve) * 6.5, 1.0)
        c.paint(lines & (row < 0.28) & (c.y > -0.7) & (c.y < 0.65), PAPER, shade=0.55)
        c.paint(page & (np.abs(c.x) < 0.03 * a), PAPER, shade=0.5)
        return
    back = c.polygon((-a + 0.1, -1), (a, -1), (a, 0.93), (a - 0.1, 1), (-a + 0.1, 1))
    c.paint(back, shade=0.6)
    c.block((-a + 0.12, -0.93, a - 0.01, 0.96), PAPER, shade=0.9)
    c.block((-a, -0.97, a - 0.1, 0.93), normal=(0.06 * c.x, -0.1))
    c.block((-a, -0.97, -a + 0.14, 0.93), normal=(-0.6, 0), shade=0.75)
    c.block((-a + 0.3 * a, -0.65, a - 0.4 * a, -0.4), PAPER, shade=0.95)


def leaf(c: Canvas, t: Traits) -> None:
    """A blade with ribs on a stalk."""
    a = c.aspect
    s = np.clip((c.y + 1) / 1.72, 0, 1)  # 0 at the tip, 1 where the stalk begins
    if t.form == "round":
        width = a * np.maximum(np.sin(np.pi * s**0.85), 0) ** 0.75
    else:
        teeth = 0.72 + 0.28 * np.abs(2 * np.mod(s * 4.0, 1.0) - 1)
        width = a * np.maximum(np.sin(np.pi * s**0.8), 0) * teeth
    half = np.maximum(width.astype(np.float32), 1e-3)
    across = c.x / half
    inside = (np.abs(across) < 1) & (c.y > -1) & (c.y < 0.72)
    c.bar((0.02, 0.6), (0.1, 0.98), 0.06, 0.6)
    fold = np.where(c.x > 0, 0.3, -0.35) + 0.25 * across
    c.paint(inside, normal=(fold.astype(np.float32), -0.15))
    rib = np.abs(np.mod((c.y + 0.55 * np.abs(c.x) / a * a) * 4.2, 1.0) - 0.5) < 0.06
    c.paint(inside & (rib | (np.abs(c.x) < 0.025)), normal=(0.0, -0.2), shade=1.3)


DRAW = {
    draw.__name__: draw
    for draw in (ball, mug, vase, plate, bottle, box, chair, lamp, car, hat, book, leaf)
}
"""Kind -> function that draws it."""
