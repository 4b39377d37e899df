"""Sprites: a drawn object with the pattern and grain of its material, lit."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlal_dist.demo.canvas import BODY, EMPTY, GLOW, HOLE, PAPER, TRIM, WINDOW, Canvas, Field
from vlal_dist.demo.shapes import DRAW
from vlal_dist.demo.world import COLORS, Traits

SUPERSAMPLING = 2
"""Pixels drawn per pixel kept, each way; `_shrink` averages two by two."""
_TILT = (0.22, 0.5)
"""Smallest and largest lean of a tilted object (radians)."""
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_FIXED = {
    TRIM: (86, 84, 82),
    HOLE: (30, 28, 27),
    PAPER: (233, 227, 210),
    WINDOW: (96, 122, 140),
    GLOW: (255, 246, 206),
}


@dataclass(frozen=True)
class Light:
    """Where the light comes from, and how strong it is.

    Attributes:
        direction: unit vector towards the light; x right, y down, z to the viewer.
        ambient: light from everywhere.
        direct: light from `direction`.
        tint: colour of all light, red to blue.
    """

    direction: tuple[float, float, float]
    ambient: float
    direct: float
    tint: tuple[float, float, float]


@dataclass(frozen=True)
class Sprite:
    """A drawn object, cut to its tight box.

    Attributes:
        color: float32 [H, W, 3], 0 to 255, multiplied by `alpha`.
        alpha: float32 [H, W], how much it hides of what is behind.
        solid: float32 [H, W], its silhouette; differs from `alpha` where one sees through.
    """

    color: Field
    alpha: Field
    solid: Field


def draw_sprite(rng: np.random.Generator, traits: Traits, light: Light, side: float) -> Sprite:
    """Draw one object; `side` is the geometric mean of its upright width and height (pixels)."""
    height = side / math.sqrt(traits.aspect)
    angle = float(rng.uniform(*_TILT)) if "tilted" in traits.states else float(rng.normal(0, 0.015))
    angle *= 1 if rng.random() < 0.5 else -1
    if traits.kind == "leaf":
        angle = float(rng.uniform(-0.5, 0.5))
    canvas = _canvas(traits.aspect, height, angle, flip=-1.0 if rng.random() < 0.5 else 1.0)
    DRAW[traits.kind](canvas, traits)
    solid = (canvas.role != EMPTY).astype(np.float32)
    color, nz = _shade(rng, canvas, traits, light)
    alpha = solid.copy()
    if traits.transparent:
        clear = (canvas.role == BODY) | (canvas.role == HOLE)
        alpha[clear] = 0.38 + 0.55 * np.clip(1.15 - nz[clear], 0, 1)
    return _shrink(np.dstack([color * alpha[..., None], alpha, solid]))


def _canvas(aspect: float, height: float, angle: float, *, flip: float) -> Canvas:
    """An empty canvas, just large enough for the turned object."""
    cos, sin = math.cos(angle), math.sin(angle)
    scale = height / 2 * SUPERSAMPLING

    def axis(half: float) -> Field:
        cells = 2 * math.ceil((half + 0.06) * scale / SUPERSAMPLING) * SUPERSAMPLING
        return ((np.arange(cells, dtype=np.float32) + 0.5) - cells / 2) / np.float32(scale)

    across, down = np.meshgrid(
        axis(aspect * abs(cos) + abs(sin)), axis(abs(cos) + aspect * abs(sin))
    )
    turned_x = (flip * (across * cos + down * sin)).astype(np.float32)
    turned_y = (down * cos - across * sin).astype(np.float32)
    return Canvas(turned_x, turned_y, aspect)


def _shade(
    rng: np.random.Generator, canvas: Canvas, traits: Traits, light: Light
) -> tuple[Field, Field]:
    """Colour (0 to 255, not multiplied) and z of the normal of every pixel."""
    shape = (canvas.x.shape[0], canvas.x.shape[1])
    first, second = _paint_color(rng, traits.color), _paint_color(rng, traits.second_color)
    print_ = pattern_weight(rng, traits.pattern, canvas.u, canvas.v)[..., None]
    texture = grain(rng, traits.material, canvas.u, canvas.v)
    albedo = (first + (second - first) * print_) * texture[..., None]
    for role, rgb in _FIXED.items():
        albedo[canvas.role == role] = rgb
    if "dirty" in traits.states:
        blot = np.clip(noise(rng, shape, shape[0] / 5) + 0.5 * noise(rng, shape, 5.0) - 0.25, 0, 1)
        albedo += (np.array([78, 62, 40], dtype=np.float32) - albedo) * (0.85 * blot)[..., None]
    nx, ny = canvas.normal_x.copy(), canvas.normal_y.copy()
    if traits.rough:
        nx += 0.22 * noise(rng, shape, 4.0)
        ny += 0.22 * noise(rng, shape, 4.0)
    length = np.sqrt(nx * nx + ny * ny)
    fit = np.minimum(1.0, 0.99 / np.maximum(length, 1e-6))
    nx, ny = nx * fit, ny * fit
    nz = np.sqrt(1 - nx * nx - ny * ny)
    lx, ly, lz = light.direction
    diffuse = light.ambient + light.direct * np.maximum(nx * lx + ny * ly + nz * lz, 0)
    diffuse *= 1 - 0.12 * np.clip(canvas.y, -1, 1)  # nearer to the ground is darker
    diffuse *= canvas.shade
    diffuse[canvas.role == GLOW] = 1.4
    color = albedo * diffuse[..., None]
    color += _gloss(canvas, traits, light, (nx, ny, nz))[..., None]
    color *= np.array(light.tint, dtype=np.float32)
    return color, nz


def _paint_color(rng: np.random.Generator, name: str) -> Field:
    """A shade of the named colour: two red objects are not equally red."""
    rgb = np.array(COLORS[name], dtype=np.float32) * rng.uniform(0.82, 1.12)
    rgb += rng.normal(0, 7, 3)
    gray = float(rgb @ _LUMINANCE)
    shade = np.clip(gray + (rgb - gray) * rng.uniform(0.75, 1.05), 8, 250)
    return np.asarray(shade, dtype=np.float32)


def _gloss(
    canvas: Canvas, traits: Traits, light: Light, normal: tuple[Field, Field, Field]
) -> Field:
    """Highlights and mirrored surroundings, added to the colour."""
    nx, ny, nz = normal
    lx, ly, lz = light.direction
    length = math.hypot(lx, ly, lz + 1.0)
    hx, hy, hz = lx / length, ly / length, (lz + 1.0) / length
    # A flat face mirrors another direction at every place, so it too shows a band of light.
    sway = 0.35 * (canvas.x + canvas.y)
    facing = np.clip((nx + sway * 0.5) * hx + (ny + sway * 0.3) * hy + nz * hz, 0, 1)
    gloss = np.zeros_like(nx)
    if traits.shiny:
        power, strength = {
            "metal": (14.0, 120.0),
            "glass": (60.0, 210.0),
            "ceramic": (46.0, 170.0),
            "plastic": (20.0, 105.0),
        }.get(traits.material, (12.0, 60.0))
        gloss += strength * facing**power
    if traits.material == "metal":
        sky = np.sin(5.5 * (0.7 * nx + 1.1 * ny + sway) + 0.6)
        gloss += (62.0 if traits.shiny else 24.0) * sky * (0.5 + 0.5 * np.abs(sky))
    if traits.material == "glass":
        gloss += 70.0 * (1 - nz) ** 2
    gloss[(canvas.role != BODY) & (canvas.role != TRIM)] = 0.0
    gloss[canvas.role == WINDOW] = 60.0 * np.maximum(sway[canvas.role == WINDOW], 0)
    return gloss


def _shrink(layers: Field) -> Sprite:
    """Average each two by two pixels and cut to the tight box."""
    small = layers[::2, ::2] + layers[1::2, ::2] + layers[::2, 1::2] + layers[1::2, 1::2]
    small *= 0.25
    solid = small[..., 4] > 0.25
    down, across = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    small = small[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
    return Sprite(color=small[..., :3], alpha=small[..., 3], solid=small[..., 4])


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Field:
    """Smooth random field with features about `cell` pixels wide; mean 0, deviation about 1."""
    rows, columns = (max(2, round(side / cell) + 2) for side in shape)
    return stretched_noise(rng, shape, (rows, columns))


def stretched_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]
) -> Field:
    """Smooth random field with `cells` features down and across."""
    coarse = rng.standard_normal(cells, dtype=np.float32)
    fine = Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(fine, dtype=np.float32)


def pattern_weight(rng: np.random.Generator, pattern: str, u: Field, v: Field) -> Field:
    """Share of the second colour at surface coordinates (u, v): 0 or 1."""
    turn = float(rng.choice([0.0, math.pi / 2, math.pi / 4])) + float(rng.normal(0, 0.06))
    pace = float(rng.uniform(2.2, 3.4))
    cos, sin = math.cos(turn) * pace, math.sin(turn) * pace
    p = u * cos + v * sin + rng.uniform(0, 1)
    q = v * cos - u * sin + rng.uniform(0, 1)
    if pattern == "striped":
        weight = np.mod(p, 1.0) < rng.uniform(0.35, 0.55)
    elif pattern == "checked":
        weight = (np.mod(p, 1.0) < 0.5) ^ (np.mod(q, 1.0) < 0.5)
    elif pattern == "dotted":
        row = np.floor(q)
        along = np.mod(p + 0.5 * np.mod(row, 2.0), 1.0) - 0.5
        weight = along * along + (np.mod(q, 1.0) - 0.5) ** 2 < 0.11
    elif pattern == "zigzag":
        weight = np.mod(q + 0.8 * np.abs(np.mod(p, 1.0) - 0.5), 0.8) < 0.36
    elif pattern == "speckled":
        weight = noise(rng, (u.shape[0], u.shape[1]), max(u.shape) / 42) > 1.0
    else:
        weight = np.zeros(u.shape, dtype=np.bool_)
    return weight.astype(np.float32)


def grain(rng: np.random.Generator, material: str, u: Field, v: Field) -> Field:
    """Brightness of a material's own texture, about 1."""
    shape = (u.shape[0], u.shape[1])
    texture = np.ones_like(u)
    if material == "wooden":
        warp = stretched_noise(rng, shape, (3, 9))
        along, across = (u, v) if rng.random() < 0.5 else (v, u)
        rings = np.sin(across * rng.uniform(16, 26) + 1.6 * warp + along * 1.5)
        fibre = stretched_noise(rng, shape, (max(4, shape[0] // 3), 5))
        texture += -0.08 + 0.16 * rings + 0.05 * fibre
    elif material == "metal":
        texture += 0.05 * stretched_noise(rng, shape, (max(4, shape[0] // 2), 3))
    elif material == "fabric":
        step = shape[0] / 2.6
        weave = np.sin(u * step) * np.sin(v * step)
        texture += -0.05 + 0.13 * np.sign(weave) + 0.09 * noise(rng, shape, shape[0] / 6)
    elif material == "stone":
        speck = noise(rng, shape, 3.0)
        vein = np.abs(noise(rng, shape, shape[0] / 4)) < 0.07
        texture += -0.05 + 0.1 * speck + 0.08 * noise(rng, shape, 14.0) - 0.3 * vein
    elif material == "paper":
        crease = noise(rng, shape, shape[0] / 3)
        texture += -0.02 + 0.03 * noise(rng, shape, 3.0) + 0.07 * np.round(crease)
    elif material == "":
        texture += 0.09 * noise(rng, shape, shape[0] / 8)
    return texture
