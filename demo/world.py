"""What exists in the demo's small world: attributes, and kinds of objects.

A kind allows some materials, forms, builds and states, so feasible sets differ from object to
object. Nothing here draws a pixel or a random number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (196, 32, 36),
    "orange": (232, 126, 30),
    "yellow": (240, 206, 52),
    "green": (52, 142, 62),
    "blue": (38, 84, 184),
    "purple": (122, 56, 152),
    "pink": (240, 148, 180),
    "brown": (122, 76, 42),
    "black": (34, 33, 36),
    "white": (236, 234, 228),
    "gray": (134, 136, 140),
}
TYPES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "material": ("wooden", "metal", "glass", "plastic", "fabric", "stone", "ceramic", "paper"),
    "pattern": ("plain", "striped", "checked", "dotted", "zigzag", "speckled"),
    "size": ("small", "medium", "large"),
    "shape": ("round", "angular", "tall", "wide"),
    "surface": ("shiny", "matte", "rough", "transparent"),
    "state": ("open", "closed", "lit", "unlit", "tilted", "upright", "dirty", "clean"),
}
PARENT_TYPES = {
    "color": ["color"],
    "material": ["material"],
    "size": ["size"],
    "shape": ["shape"],
    "texture": ["pattern", "surface"],
    "state": ["state"],
}
ATTRIBUTES = tuple(name for names in TYPES.values() for name in names)
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names}

STATE_PAIRS = {"open": "closed", "lit": "unlit", "tilted": "upright", "dirty": "clean"}
"""A state and its opposite; the opposite is the usual case, which annotators seldom mention."""
STATE_SHARE = {"open": 0.45, "lit": 0.5, "tilted": 0.3, "dirty": 0.3}

Aspects = Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Kind:
    """One kind of object.

    Attributes:
        names: names annotators use, with shares; the first is the representative.
        materials: material -> share; empty where the material is never named.
        forms: `round` or `angular` -> share.
        aspects: `tall`, `wide` or `even` -> share, smallest and largest width / height.
        states: states it may be in (keys of `STATE_PAIRS`).
        colors: colour -> share; empty: the material's.
        patterns: pattern -> share; empty: the material's.
    """

    names: Mapping[str, float]
    materials: Mapping[str, float]
    forms: Mapping[str, float]
    aspects: Aspects
    states: tuple[str, ...] = ()
    colors: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[str, float] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "ball": Kind(
        {"ball": 0.9, "balls": 0.1},
        {"plastic": 0.4, "fabric": 0.15, "wooden": 0.12, "glass": 0.13, "stone": 0.1, "metal": 0.1},
        {"round": 1.0},
        {"even": (1.0, 1.0, 1.0)},
        ("dirty",),
    ),
    "box": Kind(
        {"box": 0.88, "boxes": 0.12},
        {"paper": 0.35, "wooden": 0.3, "metal": 0.15, "plastic": 0.2},
        {"angular": 1.0},
        {"even": (0.45, 0.85, 1.2), "wide": (0.35, 1.55, 1.9), "tall": (0.2, 0.5, 0.63)},
        ("open", "dirty"),
    ),
    "mug": Kind(
        {"mug": 0.7, "mugs": 0.08, "cup": 0.22},
        {"ceramic": 0.6, "metal": 0.18, "plastic": 0.12, "glass": 0.1},
        {"round": 0.8, "angular": 0.2},
        {"even": (0.8, 1.0, 1.3), "tall": (0.2, 0.55, 0.64)},
        ("tilted", "dirty"),
    ),
    "vase": Kind(
        {"vase": 0.92, "vases": 0.08},
        {"ceramic": 0.45, "glass": 0.3, "stone": 0.15, "metal": 0.1},
        {"round": 0.65, "angular": 0.35},
        {"tall": (0.65, 0.42, 0.62), "even": (0.35, 0.78, 1.1)},
        ("tilted",),
    ),
    "plate": Kind(
        {"plate": 0.88, "plates": 0.12},
        {"ceramic": 0.6, "wooden": 0.15, "plastic": 0.13, "metal": 0.07, "glass": 0.05},
        {"round": 0.7, "angular": 0.3},
        {"wide": (0.55, 1.6, 2.2), "even": (0.45, 0.98, 1.1)},
        ("dirty",),
    ),
    "chair": Kind(
        {"chair": 0.9, "chairs": 0.1},
        {"wooden": 0.5, "plastic": 0.22, "metal": 0.16, "fabric": 0.12},
        {"angular": 0.6, "round": 0.4},
        {"tall": (0.5, 0.5, 0.63), "even": (0.5, 0.75, 0.95)},
        ("tilted",),
    ),
    "lamp": Kind(
        {"lamp": 0.92, "lamps": 0.08},
        {"fabric": 0.3, "metal": 0.3, "glass": 0.15, "paper": 0.25},
        {"angular": 0.55, "round": 0.45},
        {"tall": (0.7, 0.5, 0.63), "even": (0.3, 0.75, 0.9)},
        ("lit", "tilted"),
    ),
    "bottle": Kind(
        {"bottle": 0.88, "bottles": 0.12},
        {"glass": 0.5, "plastic": 0.35, "metal": 0.15},
        {"round": 0.65, "angular": 0.35},
        {"tall": (1.0, 0.38, 0.48)},
        ("open", "tilted"),
    ),
    "car": Kind(
        {"car": 0.75, "cars": 0.1, "automobile": 0.15},
        {"metal": 0.7, "plastic": 0.3},
        {"round": 0.5, "angular": 0.5},
        {"wide": (1.0, 1.75, 2.2)},
        ("lit", "dirty"),
        patterns={"plain": 0.75, "striped": 0.15, "checked": 0.1},
    ),
    "hat": Kind(
        {"hat": 0.9, "hats": 0.1},
        {"fabric": 0.8, "plastic": 0.2},
        {"round": 0.6, "angular": 0.4},
        {"wide": (0.5, 1.6, 1.9), "even": (0.5, 1.05, 1.3)},
        ("tilted",),
    ),
    "book": Kind(
        {"book": 0.85, "books": 0.15},
        {"paper": 0.7, "fabric": 0.3},
        {"angular": 1.0},
        {"even": (0.4, 0.72, 0.9), "wide": (0.6, 1.55, 1.9)},
        ("open",),
    ),
    "leaf": Kind(
        {"leaf": 0.72, "leaves": 0.2, "leafage": 0.08},
        {},
        {"round": 0.6, "angular": 0.4},
        {"even": (0.5, 0.8, 1.1), "tall": (0.5, 0.5, 0.62)},
        ("dirty",),
        colors={"green": 0.5, "yellow": 0.17, "orange": 0.1, "red": 0.12, "brown": 0.11},
        patterns={"plain": 0.75, "speckled": 0.25},
    ),
}
OBJECTS = tuple(KINDS)
