"""Noise, printed patterns, and the grain of materials."""

import math

import numpy as np
from PIL import Image

from demo.canvas import Field


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
