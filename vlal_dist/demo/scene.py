"""One photograph: a wall and a table top, unevenly lit, a few objects and their shadows."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from vlal_dist.demo.canvas import Field
from vlal_dist.demo.shading import Light, Sprite, draw_sprite, noise, stretched_noise
from vlal_dist.demo.world import Traits, sample_traits

WIDTH, HEIGHT = 384, 288
OBJECTS_PER_IMAGE = (3, 5)
_SIDE = {"small": (62.0, 76.0), "medium": (86.0, 104.0), "large": (118.0, 142.0)}
"""Geometric mean of width and height (pixels); the gaps make the sizes three."""
_OVERLAP = 0.16
"""Largest share of a box that another may cover when placed."""
_ATTEMPTS = 40

Box = tuple[int, int, int, int]
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Placed:
    """An object in an image; the box is x, y, width, height and may leave the image."""

    traits: Traits
    box: Box


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, list[Placed]]:
    """Draw one image; returns it with its objects, back to front."""
    light = _sample_light(rng)
    picture = _background(rng, light)
    found: list[tuple[Traits, Sprite]] = []
    for _ in range(int(rng.integers(OBJECTS_PER_IMAGE[0], OBJECTS_PER_IMAGE[1] + 1))):
        traits = sample_traits(rng)
        side = float(rng.uniform(*_SIDE[traits.size]))
        found.append((traits, draw_sprite(rng, traits, light, side)))
    objects = []
    for traits, sprite, box in _place(rng, found):
        _cast_shadow(picture, sprite, box, light)
        here, part = _windows(box[0], box[1], sprite.alpha)
        picture[here] = picture[here] * (1 - sprite.alpha[part][..., None]) + sprite.color[part]
        objects.append(Placed(traits, box))
    return _develop(rng, picture), objects


def _sample_light(rng: np.random.Generator) -> Light:
    direction = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-0.9, -0.45), rng.uniform(0.5, 0.9)])
    x, y, z = (direction / np.linalg.norm(direction)).tolist()
    warmth = float(rng.normal(0, 0.05))
    return Light(
        direction=(x, y, z),
        ambient=float(rng.uniform(0.42, 0.6)),
        direct=float(rng.uniform(0.5, 0.72)),
        tint=(1.0 + warmth, 1.0, 1.0 - warmth),
    )


def _background(rng: np.random.Generator, light: Light) -> Field:
    """A wall above, a floor or table below, each with its own texture, and a fall-off of light."""
    horizon = int(rng.uniform(0.18, 0.42) * HEIGHT)
    picture = np.empty((HEIGHT, WIDTH, 3), dtype=np.float32)
    plaster = noise(rng, (horizon, WIDTH), 40.0) + 0.5 * noise(rng, (horizon, WIDTH), 3.0)
    picture[:horizon] = _muted(rng, 110, 200) * (1 + 0.03 * plaster)[..., None]
    row = np.arange(HEIGHT - horizon, dtype=np.float32)[:, None]
    ground = (HEIGHT - horizon, WIDTH)
    kind = int(rng.integers(4))
    if kind == 0:  # planks that run away from the viewer
        depth = 1 / (row + 60.0)
        column = np.arange(WIDTH, dtype=np.float32)[None, :] - WIDTH * rng.uniform(0.3, 0.7)
        column = column * depth
        plank = np.floor(column * 5)
        texture = 1 + 0.1 * np.sin(plank * 12.9) + 0.05 * stretched_noise(rng, ground, (8, 120))
        texture -= 0.3 * (np.mod(column * 5, 1.0) < 0.03)
    elif kind == 1:  # cloth
        texture = 1 + 0.05 * noise(rng, ground, 30.0) + 0.04 * noise(rng, ground, 2.0)
    elif kind == 2:  # stone or concrete
        texture = 1 + 0.07 * noise(rng, ground, 9.0) + 0.06 * noise(rng, ground, 2.5)
    else:  # grain of a table top, across
        texture = 1 + 0.08 * stretched_noise(rng, ground, (70, 4))
    picture[horizon:] = _muted(rng, 60, 185) * texture[..., None]
    edge = np.abs(np.arange(HEIGHT, dtype=np.float32) - horizon)
    picture *= (1 - 0.25 * np.exp(-edge / 5.0))[:, None, None]
    x = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None]
    uneven = 1 + 0.28 * light.direction[0] * x - 0.1 * y - 0.12 * (x * x + y * y)
    uneven = uneven + 0.05 * noise(rng, (HEIGHT, WIDTH), 120.0)
    return np.asarray(picture * uneven[..., None] * np.array(light.tint, dtype=np.float32))


def _muted(rng: np.random.Generator, low: float, high: float) -> Field:
    """A colour as walls and tables have it: between gray and pale."""
    return (rng.uniform(low, high) + rng.normal(0, 11, 3)).astype(np.float32)


def _place(
    rng: np.random.Generator, found: list[tuple[Traits, Sprite]]
) -> list[tuple[Traits, Sprite, Box]]:
    """Choose places with little overlap; what stands lower is nearer and comes last.

    An object without a place is left out, the first one never.
    """
    boxes: list[tuple[Traits, Sprite, Box]] = []
    for traits, sprite in sorted(found, key=lambda pair: -pair[1].alpha.size):
        height, width = sprite.alpha.shape
        for _ in range(_ATTEMPTS):
            # A few leave the image by up to an eighth of their size, as photographs have it.
            x = int(rng.integers(-width // 8, max(1, WIDTH - width + width // 8)))
            foot = int(rng.integers(int(0.48 * HEIGHT), HEIGHT + height // 10))
            y = max(foot - height, -height // 12)
            box = (x, y, width, height)
            if all(_overlap(box, other) <= _OVERLAP for _, _, other in boxes):
                boxes.append((traits, sprite, box))
                break
    return sorted(boxes, key=lambda entry: entry[2][1] + entry[2][3])


def _overlap(one: Box, other: Box) -> float:
    """Area in common, as a share of the smaller box."""
    across = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    down = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    smaller = min(one[2] * one[3], other[2] * other[3])
    return max(across, 0) * max(down, 0) / smaller


def _cast_shadow(picture: Field, sprite: Sprite, box: Box, light: Light) -> None:
    """Darken the ground: the silhouette laid down away from the light, and a contact shadow."""
    x, y, width, height = box
    pad = 24
    depth = max(6, height // 3)
    silhouette = Image.fromarray((sprite.solid * 255).astype(np.uint8)).resize((width, depth))
    shear = light.direction[0] * 0.9
    layer = Image.new("L", (width + 2 * pad + 2 * depth, depth + 2 * pad))
    layer.paste(silhouette, (pad + depth, pad))
    # Output (x, y) takes input (x + shear * (rows above the foot), y).
    affine = (1, shear, -shear * (pad + depth), 0, 1, 0)
    layer = layer.transform(layer.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    layer = layer.filter(ImageFilter.GaussianBlur(5))
    dark = np.asarray(layer, dtype=np.float32) / 255 * (0.5 * light.direct / 0.6)
    here, part = _windows(x - pad - depth, y + height - depth - pad, dark)
    picture[here] *= (1 - dark)[part][..., None]


def _windows(left: int, top: int, patch: Field) -> tuple[Window, Window]:
    """The part of the picture that a patch at (left, top) covers, and that part of the patch."""
    rows, columns = patch.shape
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = max(min(left + columns, WIDTH), x0), max(min(top + rows, HEIGHT), y0)
    here = (slice(y0, y1), slice(x0, x1))
    return here, (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _develop(rng: np.random.Generator, picture: Field) -> Image.Image:
    """Lens and sensor: exposure, soft focus, grain."""
    exposed = np.clip(picture * rng.uniform(0.85, 1.15), 0, 255).astype(np.uint8)
    soft = Image.fromarray(exposed).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.9))))
    sigma = float(rng.uniform(1.5, 4.5))
    grain = rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32)
    grainy = np.asarray(soft, dtype=np.float32) + sigma * grain
    return Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8))
