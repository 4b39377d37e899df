"""The turned objects: ball, mug, vase, plate, bottle. See `demo.shapes` for the conventions."""

import numpy as np

from demo.canvas import BODY, HOLE, TRIM, Canvas, Field
from demo.traits import Traits


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
