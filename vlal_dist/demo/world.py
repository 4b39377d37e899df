"""The demo's world: attributes, and kinds of objects.

A kind allows some materials, forms, builds and states, so feasible sets differ from object to
object. Nothing here draws a pixel or a random number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

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
"""A state and its opposite, the usual case, which annotators seldom mention."""
STATE_SHARE = {"open": 0.45, "lit": 0.5, "tilted": 0.3, "dirty": 0.3}


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
    aspects: Mapping[str, tuple[float, float, float]]
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


_ANY = dict(zip(COLORS, (10, 5, 6, 6, 11, 3, 4, 3, 6, 9, 5), strict=True))
_COLORS_OF: dict[str, Mapping[str, float]] = {
    "wooden": {"brown": 12, "orange": 2, "white": 2, "red": 1, "blue": 1, "black": 1, "green": 1},
    "stone": {"gray": 9, "white": 4, "black": 3, "brown": 2, "pink": 1},
    "metal": {"gray": 8, "black": 3, "red": 3, "blue": 3, "white": 2, "yellow": 2, "green": 1},
    "glass": {"green": 5, "blue": 5, "brown": 3, "purple": 2, "white": 2, "red": 1, "yellow": 1},
    "paper": {"brown": 6, "white": 5, "red": 2, "blue": 3, "yellow": 2, "green": 2, "pink": 1},
}
_PATTERNS_OF: dict[str, Mapping[str, float]] = {
    "fabric": {"plain": 4, "striped": 3, "checked": 3, "dotted": 2, "zigzag": 2},
    "ceramic": {"plain": 5, "striped": 2, "dotted": 2, "zigzag": 1.5, "speckled": 1.5},
    "stone": {"plain": 4, "speckled": 5},
    "plastic": {"plain": 5, "striped": 2, "dotted": 2, "checked": 1, "zigzag": 1},
    "paper": {"plain": 5, "striped": 2, "checked": 2, "dotted": 1.5},
    "wooden": {"plain": 8, "striped": 1, "checked": 1},
    "glass": {"plain": 9, "striped": 1},
    "metal": {"plain": 7, "striped": 1, "dotted": 1},
}
_SURFACES = {
    "shiny": {"metal": 0.85, "glass": 1.0, "ceramic": 0.75, "plastic": 0.6, "wooden": 0.2},
    "rough": {"stone": 0.75, "fabric": 0.45, "wooden": 0.3, "paper": 0.15},
    "transparent": {"glass": 0.85, "plastic": 0.15},
}
_SIZES = {"small": 0.3, "medium": 0.42, "large": 0.28}
_SALIENCE = {
    "color": 0.5,
    "material": 0.32,
    "pattern": 0.38,
    "size": 0.2,
    "shape": 0.2,
    "surface": 0.18,
    "state": 0.32,
}
"""Chance that an annotator mentions a present attribute of that type."""
_DULL = frozenset({"plain", "medium", "matte", *STATE_PAIRS.values()})
"""Usual values: true of most objects, mentioned a quarter as often."""
_NEGATIVES = 6.3
"""Mean number of attributes that annotators rule out, per instance."""


@dataclass(frozen=True)
class Traits:
    """Everything true of one instance, as attributes and as numbers for drawing.

    Attributes:
        kind: key of `KINDS`.
        color: main colour.
        second_color: colour of the pattern; equal to `color` when plain.
        material: material, or "" for a kind whose material is never named.
        pattern: one of the patterns.
        size: small, medium or large.
        form: round or angular.
        build: tall, wide or even.
        aspect: width / height of the upright object.
        shiny: glossy rather than matte.
        rough: coarse to the touch.
        transparent: seen through.
        states: one of each pair that the kind has.
    """

    kind: str
    color: str
    second_color: str
    material: str
    pattern: str
    size: str
    form: str
    build: str
    aspect: float
    shiny: bool
    rough: bool
    transparent: bool
    states: frozenset[str]

    def attributes(self) -> frozenset[str]:
        """The complete truth: every attribute present."""
        present = {self.color, self.second_color, self.pattern, self.size, self.form, *self.states}
        present |= {self.material, self.build} - {"", "even"}
        present |= {name for name in _SURFACES if getattr(self, name)}
        return frozenset(present | (set() if self.shiny else {"matte"}))


def sample_traits(rng: np.random.Generator, kind_name: str | None = None) -> Traits:
    """Draw one instance; `kind_name` fixes its kind."""
    name = kind_name or OBJECTS[int(rng.integers(len(OBJECTS)))]
    kind = KINDS[name]
    material = pick(rng, kind.materials) if kind.materials else ""
    color = pick(rng, kind.colors or _COLORS_OF.get(material, _ANY))
    pattern = pick(rng, kind.patterns or _PATTERNS_OF[material])
    second = color
    if pattern != "plain":
        others = {**_ANY, "white": 25.0, "black": 25.0}
        del others[color]
        second = pick(rng, others)
    build = pick(rng, {value: entry[0] for value, entry in kind.aspects.items()})
    _, low, high = kind.aspects[build]
    states = [
        state if rng.random() < STATE_SHARE[state] else STATE_PAIRS[state] for state in kind.states
    ]
    return Traits(
        kind=name,
        color=color,
        second_color=second,
        material=material,
        pattern=pattern,
        size=pick(rng, _SIZES),
        form=pick(rng, kind.forms),
        build=build,
        aspect=float(rng.uniform(low, high)),
        **{name: bool(rng.random() < of.get(material, 0)) for name, of in _SURFACES.items()},
        states=frozenset(states),
    )


def plausible_attributes(kind_name: str) -> frozenset[str]:
    """Attributes an annotator would consider for an object of that kind."""
    kind = KINDS[kind_name]
    materials = tuple(kind.materials)
    found = {*materials, *kind.forms, *TYPES["size"], *(kind.colors or COLORS), "matte"}
    found |= set(kind.aspects) - {"even"}
    found.update(kind.patterns or [name for m in materials for name in _PATTERNS_OF[m]])
    found |= {name for name, shares in _SURFACES.items() if set(shares) & set(materials)}
    return frozenset(found.union(kind.states, (STATE_PAIRS[state] for state in kind.states)))


def annotate(rng: np.random.Generator, traits: Traits) -> tuple[list[str], list[str]]:
    """Partial labels: a salient part of the truth, and some attributes ruled out.

    Returns:
        Positive and negative attribute names, sorted; at least one positive.
    """
    truth = sorted(traits.attributes())
    weight = np.array([salience(a) for a in truth])
    mentioned = rng.random(len(truth)) < weight
    if not mentioned.any():
        mentioned[int(rng.choice(len(truth), p=weight / weight.sum()))] = True
    positive = [a for a, kept in zip(truth, mentioned, strict=True) if kept]
    absent = sorted(plausible_attributes(traits.kind) - set(truth))
    # Annotators rule out the alternatives of what they saw: a red mug is not a blue one.
    seen = {TYPE_OF[a] for a in positive}
    urge = np.array([2.0 if TYPE_OF[a] in seen else 1.0 for a in absent])
    count = min(len(absent), int(rng.poisson(_NEGATIVES)))
    chosen = rng.choice(len(absent), size=count, replace=False, p=urge / urge.sum())
    return positive, sorted(absent[i] for i in chosen)


def salience(attribute: str) -> float:
    """Chance that a person mentions the attribute of an object that has it."""
    return _SALIENCE[TYPE_OF[attribute]] * (0.25 if attribute in _DULL else 1.0)


def pick(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    """One key, with probability in proportion to its share."""
    weight = np.array(list(shares.values()), dtype=np.float64)
    return list(shares)[int(rng.choice(len(weight), p=weight / weight.sum()))]
