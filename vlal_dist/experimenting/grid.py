"""Which runs the paper's tables consist of: rows as overrides of one configuration.

A row has one folder whatever table asks for it: the row `selective` (the configuration as it is,
with the selective loss) stands in Table 1, in Table 2 and at the head of the ablations, and is
trained once. Everything here is plain text and pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REFERENCE = "selective"
"""The row that all others are compared with."""
PRIOR = "ce_ignoring"
"""The row whose model gives PSL its prior."""
ALL = "all"
"""NUM_IGNORE: every feasible attribute."""

TABLE1_LABELS = {
    "ce_ignoring": "CE, ignoring",
    "ce_negatifying": "CE, negatifying",
    "asl_ignoring": "ASL, ignoring",
    "asl_negatifying": "ASL, negatifying",
    "psl": "PSL",
    REFERENCE: "selective (ours)",
}
"""Rows of Table 1 in the paper's order."""

DEFAULT_MARGIN = 0.05
TEMPERATURES = {"quarter": 0.25, "half": 0.5, "twice": 2.0}


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: its folder below the root of the experiments.
        label: what the table calls it.
        overrides: dotted key -> text, laid over the configuration.
        prior: name of the row whose evaluation on the training split it needs, or None.
    """

    name: str
    label: str
    overrides: Mapping[str, str]
    prior: str | None = None


@dataclass(frozen=True)
class Base:
    """What the ablations depart from, as the configuration has it.

    Attributes:
        num_ignore: NUM_IGNORE, a number or `all`.
        margin: `method.margin`.
        draw_over: `method.draw_over`.
        draw: `method.draw`.
        draw_weights: `method.draw_weights`.
        detach_focal: `method.detach_focal`.
        temperature: tau of Eq. (2) of the likelihoods as they are.
    """

    num_ignore: str
    margin: float
    draw_over: str
    draw: str
    draw_weights: str
    detach_focal: bool
    temperature: float


def table1_rows() -> list[Variant]:
    """Table 1: six losses on the same data."""
    return [
        Variant(name, label, {"method.loss": name}, PRIOR if name == "psl" else None)
        for name, label in TABLE1_LABELS.items()
    ]


def table2_rows(num_ignores: Sequence[int], own: str) -> list[Variant]:
    """Table 2: NUM_IGNORE from 0 (nothing ignored) over `num_ignores` to all.

    Args:
        num_ignores: the values between; the configuration's own is added.
        own: the configuration's own NUM_IGNORE: its row is the reference.
    """
    numbers = {0, *num_ignores} | ({int(own)} if own != ALL else set())
    return [_ignoring(str(n), own) for n in sorted(numbers)] + [_ignoring(ALL, own)]


def ablation_rows(base: Base) -> list[Variant]:
    """One change each from the configuration, which heads the list as the reference."""
    margin = 0.0 if base.margin else DEFAULT_MARGIN
    over = "unannotated" if base.draw_over == "feasible" else "feasible"
    draw = "top" if base.draw == "random" else "random"
    detach = not base.detach_focal
    rows = [
        Variant(REFERENCE, "selective, as configured", {"method.loss": REFERENCE}),
        _change(f"margin-{margin:g}", f"margin {margin:g}", "method.margin", f"{margin:g}"),
        _change(f"draw_over-{over}", f"draw over {over}", "method.draw_over", over),
    ]
    for name, factor in TEMPERATURES.items():
        tau = repr(base.temperature * factor)
        label = f"temperature {float(tau):.4g} ({name})"
        rows.append(_change(f"temperature-{name}", label, "scoring.temperature", tau))
    rows.append(_change(f"draw-{draw}", f"draw {draw}", "method.draw", draw))
    rows += [
        _change(f"draw_weights-{name}", f"draw by {name}", "method.draw_weights", name)
        for name in ("likelihood", "uniform", "cooccurrence")
        if name != base.draw_weights
    ]
    label = "focal weight detached" if detach else "gradient through the focal weight"
    text = str(detach).lower()
    rows.append(_change(f"detach_focal-{text}", label, "method.detach_focal", text))
    rows += [
        Variant(f"num_ignore-{value}", label, _num_ignore(value))
        for value, label in (("0", "nothing ignored"), (ALL, "all feasible ignored"))
        if value != base.num_ignore
    ]
    return rows


def _ignoring(value: str, own: str) -> Variant:
    if value == own:
        return Variant(REFERENCE, value, {"method.loss": REFERENCE})
    return Variant(f"num_ignore-{value}", value, _num_ignore(value))


def _num_ignore(value: str) -> dict[str, str]:
    return {"method.loss": REFERENCE, "method.num_ignore": value}


def _change(name: str, label: str, key: str, value: str) -> Variant:
    return Variant(name, label, {"method.loss": REFERENCE, key: value})
