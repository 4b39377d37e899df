"""What each loader made of a fault, as a cell of the table of benchmarks/damage/damage.py.

A cell says whether the fault was told of, and whether every sample came once, as it was packed.
"""

from collections import Counter
from dataclasses import dataclass, field

from tests.fixtures.damaged_tars import Given
from vlal_dist.data.loading.shard_reader import DamagedError

Contents = dict[str, tuple[bytes, ...]]
"""Sample key -> the bytes of its fields."""


@dataclass(frozen=True)
class Cell:
    """What a loader made of a fault.

    Attributes:
        text: for the table.
        told: it ended with an error, or named or warned of what is missing.
        whole: it gave out every sample once, as it was packed.
    """

    text: str
    told: bool
    whole: bool


@dataclass(frozen=True)
class Row:
    """One fault; `cells` are those of our two modes, then of webdataset's two handlers."""

    name: str
    what: str
    cells: list[Cell]


@dataclass
class Tally:
    """One epoch of webdataset.

    Attributes:
        found: how often each sample came as it was packed.
        altered: samples that came otherwise.
        error: what ended it.
        warned: warnings.
    """

    found: Counter[str] = field(default_factory=Counter)
    altered: int = 0
    error: str = ""
    warned: int = 0


def our_cell(given: list[Given], expected: list[dict[int, tuple[int, str]]], repeats: int) -> Cell:
    """What our loader made of it; a loss without a word ends the benchmark."""
    for one, rows in zip(given, expected, strict=True):
        lost = len(rows) - len(one.rows)
        accounted = one.error is not None or lost == len(one.damaged) == one.left_out.count
        if not (one.rows.items() <= rows.items() and accounted):
            raise SystemExit("our loader gave out a damaged sample, or lost one")
    errors = [one.error for one in given if one.error is not None]
    if errors:
        return Cell(f"stops: {why(errors[0])}", True, False)
    planned, got = (sum(map(len, rows)) for rows in (expected, (one.rows for one in given)))
    text = f"{got} of {planned}"
    refetched = sum(int(one.numbers["refetched"]) for one in given)
    if got < planned:
        return Cell(f"{text}, {planned - got} quarantined", True, False)
    text += f", {counted(repeats, 'read')} repeated" if repeats else ""
    text += f", {counted(refetched, 'sample')} read again: crc32" if refetched else ""
    return Cell(text, False, True)


def counted(number: int, what: str) -> str:
    """1 read, 2 reads."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def why(error: Exception) -> str:
    """The check that ended our epoch."""
    if not isinstance(error, DamagedError):
        return type(error).__name__
    return "crc32" if error.damage.check.startswith("crc32") else "the shard's end"


def webdataset_cell(epochs: list[Tally], expected: Contents) -> Cell:
    """What webdataset made of it."""
    given = sum(len(+one.found) for one in epochs)
    planned = len(expected) * len(epochs)
    altered = sum(one.altered for one in epochs)
    doubled = sum(times - 1 for one in epochs for times in (+one.found).values())
    warned = sum(one.warned for one in epochs)
    text = [f"{given} of {planned}"]
    text += [f"{altered} altered"] if altered else []
    text += [f"{doubled} twice"] if doubled else []
    for name, times in Counter(one.error for one in epochs if one.error).items():
        text.append(name if len(epochs) == 1 else f"{name} in {counted(times, 'epoch')}")
    text += [counted(warned, "warning")] if warned else []
    told = bool(warned or any(one.error for one in epochs))
    whole = given == planned and not altered and not doubled
    text += [] if told or whole else ["**silent**"]
    return Cell(", ".join(text), told, whole)
