"""Photos in tables: Parquet and Arrow files with the bytes of images in a column.

Hugging Face's `datasets` writes such columns as struct<bytes: binary, path: string>; a plain binary
column is read too.
"""

from collections import Counter
from collections.abc import Sequence

LONGEST_NAME = 1000
"""Characters of a name that a row may give its photo."""


def row_names(paths: Sequence[str | None] | None, *, count: int, stem: str) -> list[str]:
    """The name of the photo in each row of one file; names are unique in the file.

    Args:
        paths: of each row what the column's struct gives as `path`; None: it gives none.
        count: rows of the file.
        stem: name of the file without folders and suffix.

    Returns:
        A row's path where it can be a name below a place and no other row has it, else
        `STEM-ROW`, the row from 0 with eight digits.
    """
    numbered = [f"{stem}-{row:08d}" for row in range(count)]
    if paths is None:
        return numbered
    found = Counter(path for path in paths if path is not None)
    taken = set(numbered)
    return [
        path if path is not None and found[path] == 1 and path not in taken and _is_name(path)
        else number
        for path, number in zip(paths, numbered, strict=True)
    ]  # fmt: skip


def _is_name(path: str) -> bool:
    """Whether `Photos` can find a file of that name: relative, without empty parts and `..`."""
    parts = path.split("/")
    return (
        0 < len(path) <= LONGEST_NAME
        and "\\" not in path
        and path.isprintable()
        and not any(part in ("", ".", "..") for part in parts)
    )
