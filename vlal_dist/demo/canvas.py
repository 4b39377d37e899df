"""A patch of pixels on which an object is built from simple parts, before it is shaded.

Every pixel of the patch holds which part of the object it belongs to (`role`), the surface normal,
and two surface coordinates that patterns follow. Parts are painted back to front.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Point = tuple[float, float]

EMPTY, BODY, TRIM, HOLE, PAPER, WINDOW, GLOW = range(7)
"""Roles: the coloured surface, darker fittings, dark openings, pages, panes, what gives light."""


class Canvas:
    """Pixels of one object in its own coordinates.

    `x` runs from -aspect to +aspect over the object's width, `y` from -1 (top) to +1; both extend
    beyond, to leave room for a tilt.
    """

    def __init__(self, x: Field, y: Field, aspect: float) -> None:
        self.x, self.y, self.aspect = x, y, aspect
        self.role = np.zeros(x.shape, dtype=np.uint8)
        self.normal_x, self.normal_y, self.u, self.v = (np.zeros_like(x) for _ in range(4))
        self.shade = np.ones_like(x)

    def paint(
        self,
        mask: Mask,
        role: int = BODY,
        *,
        normal: tuple[Field | float, Field | float] = (0.0, 0.0),
        surface: tuple[Field, Field] | None = None,
        shade: Field | float = 1.0,
    ) -> None:
        """Cover the pixels of `mask` with one part.

        Args:
            mask: the pixels.
            role: of the part.
            normal: x and y of the surface normal, -1 to 1; z follows.
            surface: coordinates that patterns follow; absent: the patch's own.
            shade: brightness of the part, 1 is neutral.
        """
        self.role[mask] = role
        layers = (self.normal_x, self.normal_y, self.u, self.v, self.shade)
        values = (*normal, *(surface or (self.x, self.y)), shade)
        for layer, value in zip(layers, values, strict=True):
            np.copyto(layer, value, where=mask)

    def ellipse(self, center: Point, radius: Point) -> Field:
        """Squared distance from `center` in units of the radii; below 1 is inside."""
        along = (self.x - center[0]) / radius[0]
        across = (self.y - center[1]) / radius[1]
        return np.asarray(along * along + across * across, dtype=np.float32)

    def rectangle(self, left: float, top: float, right: float, bottom: float) -> Mask:
        """Inside of an upright rectangle."""
        return (self.x > left) & (self.x < right) & (self.y > top) & (self.y < bottom)

    def polygon(self, *corners: Point) -> Mask:
        """Inside of a convex polygon; corners clockwise on the screen."""
        inside = np.ones(self.x.shape, dtype=np.bool_)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            inside &= (x1 - x0) * (self.y - y0) - (y1 - y0) * (self.x - x0) >= 0
        return inside

    def disc(self, center: Point, radius: Point, role: int = BODY, **more: Any) -> None:
        """Paint the inside of an ellipse; more arguments as `paint`."""
        self.paint(self.ellipse(center, radius) < 1, role, **more)

    def block(self, sides: Sequence[float], role: int = BODY, **more: Any) -> None:
        """Paint a rectangle (left, top, right, bottom); more arguments as `paint`."""
        self.paint(self.rectangle(*sides), role, **more)

    def bar(
        self, start: Point, end: Point, width: float, shade: float = 1.0, *, role: int = BODY
    ) -> None:
        """A round rod between two points, shaded across its width."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = float(np.hypot(dx, dy))
        along = ((self.x - start[0]) * dx + (self.y - start[1]) * dy) / length
        across = ((self.x - start[0]) * -dy + (self.y - start[1]) * dx) / length
        mask = (np.abs(across) < width / 2) & (along > -width / 3) & (along < length + width / 3)
        tilt = across / (width / 2)
        self.paint(
            mask,
            role,
            normal=(tilt * (-dy / length), tilt * (dx / length)),
            surface=(across, along),
            shade=shade,
        )

    def turned(
        self,
        radius: Field,
        top: float,
        bottom: float = 1.0,
        *,
        center: float = 0.0,
        angular: bool = False,
        role: int = BODY,
        bulge: float = 0.18,
        slope: Field | float = 0.0,
    ) -> None:
        """A body turned about an upright axis, seen slightly from above.

        Args:
            radius: half width at every pixel's height.
            top: first y.
            bottom: last y on the axis.
            center: x of the axis.
            angular: with three flat facets instead of a smooth turn.
            role: of the part.
            bulge: how far the lower rim curves down, share of the radius.
            slope: y of the normal.
        """
        across = np.clip((self.x - center) / np.maximum(radius, 1e-3), -1.0, 1.0)
        sag = bulge * radius * (np.sqrt(1 - across * across) - 1)
        mask = (np.abs(self.x - center) < radius) & (self.y > top) & (self.y < bottom + sag)
        turn = np.arcsin(across) * 0.6
        if angular:
            across = np.where(np.abs(across) < 0.45, 0.1, np.sign(across) * 0.85)
        self.paint(mask, role, normal=(across * 0.96, slope), surface=(turn, self.y - sag))
