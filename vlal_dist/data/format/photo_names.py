"""Names of photos: what a name may be, which files it may mean, and what may be read.

Names come from tables and records that others wrote. Every kind of place answers by these rules.
"""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vlal_dist.data.format.images import photo_format
from vlal_dist.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""What may follow a name that has no suffix, in any case."""
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".cr2", ".dng")
"""As `SUFFIXES`, looked for last, so that the reason is the format and not "missing"."""
MAX_BYTES = 256_000_000
"""Default of `pack.max_bytes` and `predict.max_bytes`."""
LEFT_OUT = "left out"
"""Reason of a listed file that is no photo."""


class MissingPhotoError(DataError):
    """No photo of that name."""


@dataclass(frozen=True)
class Limits:
    """What may be read.

    Attributes:
        setting: the key of the configuration that names the places, for errors; may be empty.
        max_bytes: of a photo's file.
        follow_links: whether links of a folder may lead out of all named places.
        image_column: of tables, the column with the bytes; None: the only one.
        cache: folder for rows of tables that are read again and again, and for lists of tars,
            shared by processes; may be empty.
        command: names the command whose processes share lists of tars; empty: none are shared.
    """

    setting: str
    max_bytes: int = MAX_BYTES
    follow_links: bool = False
    image_column: str | None = None
    cache: str = ""
    command: str = ""

    def option(self, name: str) -> str:
        """The key of a setting beside `setting`."""
        return f"{self.setting.partition('.')[0]}.{name}"

    def check_size(self, name: str, size_bytes: int) -> None:
        """Raise `too large: ...` above the limit."""
        if size_bytes > self.max_bytes:
            meant = f"raise {self.option('max_bytes')}" if self.setting else "open it with Pillow"
            raise DataError(
                f"too large: {printable(name)} has {size_bytes} bytes, limit {self.max_bytes}; "
                f"{meant} if the photo is meant"
            )


class Place(Protocol):
    """One folder, zip or bucket. Paths are those of `list_names` and `candidates`."""

    where: str

    def list_names(self) -> tuple[list[str], Counter[str]]:
        """As `Photos.list_names`, in any order; and how many files are left out, by reason."""
        ...

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        """Files that `name`, or `name` and a suffix, may mean, in any case.

        Args:
            name: `/`-separated, without `..`.
            anywhere: also in other folders, whose path ends with that of `name`.
        """
        ...

    def holds(self, name: str) -> bool:
        """Whether the absolute path `name` lies below the place."""
        ...

    def read(self, path: str, *, listed: bool) -> bytes:
        """A file's content; of a listed one, only if it is a photo by suffix or content."""
        ...


def printable(text: str, *, length: int = 200) -> str:
    """At most `length` characters that any file can hold: what is no Unicode text as `\\udcXX`."""
    short = text if len(text) <= length else f"{text[:length]}..."
    return short.encode("utf-8", "backslashreplace").decode()


def choose(name: str, found: Sequence[str], *, where: str) -> str | None:
    """The file that a name means: its own, then with a suffix, then in another case.

    A name without a suffix is rather that of a photo with one.

    Raises:
        DataError: `ambiguous: ...`, several files are meant equally well.
    """
    base, found = name.rpartition("/")[2], sorted(found)
    bases = [(path, path.rpartition("/")[2]) for path in found]
    exact = [path for path, one in bases if one == base]
    suffixed = [
        path for path, one in bases if one.startswith(base) and one[len(base) :].lower() in SUFFIXES
    ]
    known = [path for path, one in bases if has_suffix(one) or name_key(one) == name_key(base)]
    tiers = [exact, suffixed] if has_suffix(base) else [suffixed, exact]
    for tier in (*tiers, known, found):
        if len(tier) > 1:
            raise DataError(
                f"ambiguous: {printable(name)} names both {printable(tier[0])} and "
                f"{printable(tier[1])} in {printable(where)}; write the path with its suffix"
            )
        if tier:
            return tier[0]
    return None


def name_forms(name: str) -> list[str]:
    """A name without empty parts and `.`, as written and, if it holds any, with `\\` as `/`.

    Raises:
        DataError: `outside: ...`, it holds `..`.
    """
    if "\0" in name:
        raise DataError(f"unreadable: {printable(name)!r} holds a NUL")
    if ".." in re.split(r"[/\\]", name):
        raise DataError(
            f"outside: {printable(name)} has a part '..'; write the path below the place"
        )
    slash = "/" if name.startswith("/") else ""
    forms = (name, name.replace("\\", "/"))
    cleaned = ("/".join(part for part in one.split("/") if part not in ("", ".")) for one in forms)
    return [slash + one for one in dict.fromkeys(cleaned)]


def check_photo(path: str, head: bytes) -> None:
    """Raise `left out: ...` for a file that is a photo neither by suffix nor by its first bytes."""
    if not has_suffix(path) and photo_format(head) is None:
        raise DataError(f"{LEFT_OUT}: not a photo")


def has_suffix(name: str) -> bool:
    """Whether a name ends with a photo's suffix, in any case."""
    return name.lower().endswith(SUFFIXES)


def name_key(name: str) -> str:
    """A name without case, and composed: macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name).casefold()


def name_keys(base: str) -> set[str]:
    """Keys of the files that a name without folders may mean: its own, and with each suffix."""
    key = name_key(base)
    return {key, *(key + suffix for suffix in SUFFIXES + UNREAD_SUFFIXES)} if base else set()


def is_hidden(path: str) -> bool:
    """Whether a part of the path begins with a dot, or is macOS's folder of metadata."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


class MemberIndex:
    """Files within containers, by name: 50 bytes each beside the text of its name.

    The path of a file is `CONTAINER/NAME`. Its name alone leads to it as well.

    Args:
        containers: names without `/`, all different.

    Attributes:
        hidden: number of files that are not found: hidden, or without a name.
    """

    def __init__(self, containers: Sequence[str]) -> None:
        self.hidden = 0
        self._containers = list(containers)
        self._text = bytearray()
        self._ends, self._container = array("q"), array("i")
        self._first, self._second, self._hashes = array("q"), array("q"), array("q")
        self._order: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, container: int, name: str, first: int, second: int) -> None:
        """Add a file and two numbers that say where it lies."""
        name = "/".join(part for part in name.split("/") if part not in ("", "."))
        if not name or "\0" in name or is_hidden(name):
            self.hidden += 1
            return
        self._text += name.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))
        self._container.append(container)
        self._first.append(first)
        self._second.append(second)
        self._hashes.append(hash(name_key(name.rpartition("/")[2])))
        self._order = None

    def paths(self) -> list[str]:
        """The paths of all files."""
        return [self._path(row) for row in range(len(self))]

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        """See `Place.candidates`. Of equal rank are files of one name in different containers."""
        folder, _, base = name.rpartition("/")
        keys = name_keys(base)
        paths = dict.fromkeys(map(self._path, self._rows(keys)))
        found = [path for path in paths if name_key(path.rpartition("/")[2]) in keys]
        below = [(path, path.partition("/")[2].rpartition("/")[0]) for path in found]
        if anywhere:
            return [path for path, one in below if not folder or f"/{one}".endswith(f"/{folder}")]
        whole = [path for path in found if path.rpartition("/")[0] == folder]
        return whole or [path for path, one in below if one == folder]

    def where(self, path: str) -> list[tuple[int, int, int]]:
        """Container and the two numbers of each file of that path."""
        rows = self._rows([name_key(path.rpartition("/")[2])])
        return [
            (self._container[row], self._first[row], self._second[row])
            for row in rows
            if self._path(row) == path
        ]

    def _rows(self, keys: Collection[str]) -> list[int]:
        """Files whose name may have one of these keys."""
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        order = self._order
        if order is None:
            order = self._order = np.argsort(hashes, kind="stable")
        wanted = np.array([hash(key) for key in keys], dtype=np.int64)
        low = np.searchsorted(hashes, wanted, "left", order)
        high = np.searchsorted(hashes, wanted, "right", order)
        return [int(row) for at in np.flatnonzero(high > low) for row in order[low[at] : high[at]]]

    def _path(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        name = self._text[start : self._ends[row]].decode("utf-8", "surrogatepass")
        return f"{self._containers[self._container[row]]}/{name}"
