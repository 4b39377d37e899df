"""Tables of prediction requests: what their columns mean."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlal_dist.data.format import tables
from vlal_dist.data.format.photos import printable
from vlal_dist.data.format.tables import OBJECT_COLUMNS, SIDES, plain_name, quoted
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.remarks import remark

logger = logging.getLogger(__name__)

COLUMNS = {
    "image": ("image", "file_name", "filename", "photo"),
    **OBJECT_COLUMNS,
    "": ("positive_attributes", "negative_attributes", "instance_polygon"),
}
"""What a column gives -> its names, without case; those of `""` are VAW's, and not read."""
_MEANING = {name: meaning for meaning, names in COLUMNS.items() for name in names}
_ALLOWED = (
    "; ".join(
        f"{meaning}: {' '.join(COLUMNS[meaning])}" for meaning in ("image", "object", "id", "box")
    ).replace("photo;", "photo image_id;")
    + "; or the box by "
    + " or ".join(" ".join(sides) for sides in SIDES[:2])
)

Rows = Iterator[tuple[int, tables.Record | DataError]]
"""Number of a row, from 0, and the row."""


def read_table(path: Path, ignored: Sequence[str]) -> tuple[Rows, int]:
    """The rows, read one after another, and their number (0: not known).

    Args:
        path: of the table; its suffix, in any case, gives the format.
        ignored: names of columns that are left out.

    Raises:
        ConfigError: no such file, or another suffix; `ignored` names a column that is not there.
        DataError: the file is damaged, or a column is not understood (JSON lines: the row has it).
    """
    rows, count = tables.read_rows(path, _Columns(ignored), setting="predict.table")
    return ((row, record) for row, _, record in rows), count


class _Columns:
    """The meaning of column names.

    Args:
        ignored: names that are left out.
    """

    def __init__(self, ignored: Sequence[str]) -> None:
        self._ignored = {plain_name(name): name for name in ignored}
        self._met: set[str] = set()
        self._corners_logged = False

    def resolve(self, names: Sequence[str]) -> dict[str, int]:
        """Meaning -> place among `names`.

        Raises:
            DataError: `unknown column: ...`, `two columns: ...` or `bad box: ...`.
        """
        found: dict[str, int] = {}
        for place, name in enumerate(names):
            if (plain := plain_name(name)) in self._ignored:
                self._met.add(plain)
                continue
            meaning = _MEANING.get(plain)
            if meaning is None:
                raise DataError(
                    f"unknown column: {quoted(name)} is not understood; known are {_ALLOWED}; "
                    f'rename it, or leave it out: --predict.ignore_columns "[{quoted(name)}]"'
                )
            if meaning in found and meaning:
                raise _two_columns(names[found[meaning]], name, what=meaning)
            found[meaning] = place
        found.pop("", None)
        sides = [side for side in found if any(side in form for form in SIDES)]
        if sides and "box" in found:
            raise _two_columns(names[found["box"]], names[found[sides[0]]], what="box")
        if sides and not any(set(sides) == set(form) for form in SIDES):
            raise DataError(
                f"bad box: {', '.join(quoted(names[found[side]]) for side in sides)} are not "
                f"complete; a box is {' or '.join(' '.join(form) for form in SIDES)}; add what is "
                "missing, or leave these out by predict.ignore_columns"
            )
        if "x2" in found and not self._corners_logged:
            self._corners_logged = True
            corners = ", ".join(quoted(names[found[side]]) for side in SIDES[1])
            logger.info("the columns %s are read as two corners of the box, in pixels", corners)
        if "image_id" in found:
            found.setdefault("image", found.pop("image_id"))
        return found

    def resolve_header(self, names: Sequence[str], path: Path) -> dict[str, int]:
        """As `resolve`, of a table whose rows all have the same columns."""
        try:
            found = self.resolve(names)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        listed = printable(", ".join(names), length=1000)
        for name in self.not_met():
            raise ConfigError(
                f"predict.ignore_columns: {path} has no column {name!r}; it has {listed}"
            )
        if "image" not in found:
            raise DataError(
                f"{path} has the columns {listed}; needed is image; known are {_ALLOWED}"
            )
        return found

    def not_met(self) -> list[str]:
        """Names to be left out of which there was no column."""
        return [name for plain, name in self._ignored.items() if plain not in self._met]

    def end(self, path: Path) -> None:
        """Warn of names to be left out that no row had."""
        for name in self.not_met():
            text = "predict.ignore_columns: no row of %s has %r"
            remark(logger, "predict.ignore_columns", text, path, name)


def _two_columns(first: str, second: str, *, what: str) -> DataError:
    same = plain_name(first) == plain_name(second)
    remedy = "remove or rename one" if same else "leave one out by predict.ignore_columns"
    return DataError(
        f"two columns: {quoted(first)} and {quoted(second)} both give the {what}; {remedy}"
    )
