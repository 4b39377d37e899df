"""Grid of runs behind the paper's tables: rows as overrides of one configuration.

A row has one folder in all tables: the row `selective` (the configuration itself, with the
selective loss) is in Table 1, in Table 2 and first of the ablations, and is trained once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlal_dist.config.sections import LossConfig

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
WEIGHTS = ("likelihood", "uniform", "cooccurrence")
SELECTIVE = {"method.loss": REFERENCE}


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: its folder below the root of the experiments.
        label: its name in the table.
        overrides: dotted key -> text, changes of the configuration.
        prior: name of the row whose evaluation on the training split it needs, or None.
    """

    name: str
    label: str
    overrides: Mapping[str, str]
    prior: str | None = None


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
    return [
        Variant(REFERENCE, value, SELECTIVE)
        if value == own
        else Variant(f"num_ignore-{value}", value, {**SELECTIVE, "method.num_ignore": value})
        for value in [*map(str, sorted(numbers)), ALL]
    ]


def ablation_rows(method: LossConfig, temperature: float) -> list[Variant]:
    """The configuration itself, the reference, and rows with one change each.

    Args:
        method: section of the configuration.
        temperature: tau of Eq. (2) of the likelihoods as they are.
    """
    margin = f"{0.0 if method.margin else DEFAULT_MARGIN:g}"
    over = "unannotated" if method.draw_over == "feasible" else "feasible"
    draw = "top" if method.draw == "random" else "random"
    detach = str(not method.detach_focal).lower()
    gradient = (
        "gradient through the focal weight" if method.detach_focal else "focal weight detached"
    )
    counts = {"0": "nothing ignored", ALL: "all feasible ignored"}
    changes = [
        (f"margin-{margin}", f"margin {margin}", "method.margin", margin),
        (f"draw_over-{over}", f"draw over {over}", "method.draw_over", over),
        *(
            (
                f"temperature-{name}",
                f"temperature {temperature * factor:.4g} ({name})",
                "scoring.temperature",
                repr(temperature * factor),
            )
            for name, factor in TEMPERATURES.items()
        ),
        (f"draw-{draw}", f"draw {draw}", "method.draw", draw),
        *(
            (f"draw_weights-{name}", f"draw by {name}", "method.draw_weights", name)
            for name in WEIGHTS
            if name != method.draw_weights
        ),
        (f"detach_focal-{detach}", gradient, "method.detach_focal", detach),
        *(
            (f"num_ignore-{value}", label, "method.num_ignore", value)
            for value, label in counts.items()
            if value != str(method.num_ignore)
        ),
    ]
    return [
        Variant(REFERENCE, "selective, as configured", SELECTIVE),
        *(Variant(name, label, {**SELECTIVE, key: value}) for name, label, key, value in changes),
    ]
