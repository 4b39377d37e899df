"""Photos by name, from folders, zip files and buckets; for pack and predict.

Names come from tables and records that others wrote: a name leads to a regular file below a named
place, within a limit of bytes, or to an error whose text begins with the reason.
"""

import os
import re
import stat
import struct
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from vlal_dist.data.format.images import HEAD_BYTES, photo_format
from vlal_dist.errors import ConfigError, DataError, NotFoundError, StorageError
from vlal_dist.storage.checks import TEMPORARY_PREFIX
from vlal_dist.storage.store import Store, open_store

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""What may follow a name that has no suffix, in any case."""
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".cr2", ".dng")
"""As `SUFFIXES`, looked for last, so that the reason is the format and not "missing"."""
MAX_BYTES = 256_000_000
"""Default of `pack.max_bytes` and `predict.max_bytes`."""
_HEADER_BYTES = 30
"""The fixed part of a zip member's header."""
_LONGEST_KEY = 1000
"""Bytes of an object's name; S3 has 1,024 with the prefix, and answers with an error above."""
LEFT_OUT = "left out"
"""Reason of a listed file that is no photo."""
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate"}
"""Compression of zip members; only these are unpacked piece by piece, within a limit."""


class MissingPhotoError(DataError):
    """No photo of that name."""


@dataclass(frozen=True)
class Limits:
    """What may be read.

    Attributes:
        setting: the key of the configuration that names the places, for errors; may be empty.
        max_bytes: of a photo's file.
        follow_links: whether links of a folder may lead out of all named places.
    """

    setting: str
    max_bytes: int = MAX_BYTES
    follow_links: bool = False

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


class Photos:
    """The photos of one or several places; safe to read from many threads.

    A name is a path below a folder (or an absolute path of a file below it), a member of a zip or
    the end of its path, or a key of a bucket. Without a suffix it stands for the photo with that
    name and any of `SUFFIXES`. The first place that holds a name is used.

    Args:
        places: folders, zip files, single photos, or `s3://bucket/prefix`.
        limits: what may be read.

    Attributes:
        left_out: files that the listing leaves out, by reason.

    Raises:
        ConfigError: nothing that can hold photos is there.
        DataError: a zip is damaged.
    """

    def __init__(self, places: Sequence[str], limits: Limits) -> None:
        self.left_out: Counter[str] = Counter()
        roots: list[str] = []  # real paths that links may lead to, filled by the folders
        self._places = [_open_place(place, limits, roots) for place in places]
        self._limits, self._listed = limits, frozenset[str]()

    def list_names(self) -> list[str]:
        """All files of the first place, sorted; `read` says which of them are photos.

        Links are followed, each folder is listed once. Left out are hidden files and folders,
        `__MACOSX`, and what is no regular file.

        Raises:
            StorageError: the place cannot be listed.
        """
        names, self.left_out = self._places[0].list_names()
        self._listed = frozenset(names)
        return sorted(names)

    def read(self, name: str) -> bytes:
        """A photo's file: exactly that file for a listed name, else what `name` leads to.

        Raises:
            MissingPhotoError: `missing: ...`, no such photo, and which names were tried.
            DataError: `left out: ...`, a listed file that is no photo by suffix or content; or
                `unreadable: ...`, `outside: ...`, `ambiguous: ...`, `too large: ...`.
            StorageError: the bucket cannot be read.
        """
        if name in self._listed:
            with _named_errors(name, self._places[0].where):
                return self._places[0].read(name, listed=True)
        forms = _forms(name)
        for place in self._places:
            with _named_errors(name, place.where):
                for form, anywhere in ((f, a) for a in (False, True) for f in forms):
                    found = place.candidates(form, anywhere=anywhere)
                    if path := _choose(form, found, where=place.where):
                        return place.read(path, listed=False)
        where = printable(", ".join(place.where for place in self._places))
        if name.startswith("/") and not any(place.holds(name) for place in self._places):
            raise DataError(
                f"outside: {printable(name)} is not below {where}; name a folder that holds it as "
                f"{self._limits.setting}"
            )
        tried = f"tried {printable(forms[0])}"
        if not _has_suffix(forms[0]):
            tried += f", and {printable(forms[0])} followed by {' '.join(SUFFIXES)} in any case"
        raise MissingPhotoError(f"missing: no such photo in {where}: {tried}")


def printable(text: str, *, length: int = 200) -> str:
    """At most `length` characters that any file can hold: what is no Unicode text as `\\udcXX`."""
    short = text if len(text) <= length else f"{text[:length]}..."
    return short.encode("utf-8", "backslashreplace").decode()


def read_file(path: str, limits: Limits, *, by_content: bool = False) -> bytes:
    """A regular file's content; no device, pipe or socket is opened.

    Args:
        path: of the file; a link is followed.
        limits: the largest file.
        by_content: refuse a file that is no photo by suffix or content.

    Raises:
        DataError: `not a file: ...`, `too large: ...`, or `left out: ...`.
        OSError: it is not there or cannot be read.
    """
    _check_regular(path, os.stat(path).st_mode)
    # O_NONBLOCK: if a pipe took the file's place since, opening it must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        _check_regular(path, found.st_mode)
        head = file.read(HEAD_BYTES)
        if by_content:
            _check_photo(path, head)
        limits.check_size(path, found.st_size)
        pieces = [head]
        left = found.st_size - len(head)
        while left > 0 and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


class _Place(Protocol):
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


class _Folder:
    """A folder, or a single file of it."""

    def __init__(self, root: str, limits: Limits, roots: list[str], *, only: str = "") -> None:
        self.where = os.path.join(root, only) if only else root
        self._root, self._limits, self._only = os.path.abspath(root), limits, only
        self._roots = roots
        roots.append(os.path.realpath(self.where))
        self._indexes: dict[str, dict[str, list[str]]] = {}
        self._lock = threading.Lock()

    def list_names(self) -> tuple[list[str], Counter[str]]:
        names, left_out = [self._only] if self._only else [], Counter[str]()
        seen: set[tuple[int, int]] = set()
        # Folders before links to folders, so that a folder that has both names keeps its own.
        folders, links = deque(() if self._only else [""]), deque[str]()
        while folders or links:
            folder = (folders or links).popleft()
            try:
                found = os.stat(self._full(folder))
                if (found.st_dev, found.st_ino) in seen:
                    left_out["link to a folder that is listed"] += 1
                    continue
                seen.add((found.st_dev, found.st_ino))
                with os.scandir(self._full(folder)) as scanned:
                    entries = sorted(scanned, key=lambda entry: entry.name)
            except OSError as error:
                if not folder:
                    raise StorageError(f"{self.where}: {error.strerror}; check the path") from None
                left_out["unreadable folder"] += 1
                continue
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                kind = _kind(entry)
                if _is_hidden(entry.name):
                    left_out["hidden"] += not entry.name.startswith(TEMPORARY_PREFIX)
                elif kind == stat.S_IFDIR:
                    (links if entry.is_symlink() else folders).append(path)
                elif kind == stat.S_IFREG:
                    names.append(path)
                else:
                    left_out["special file"] += 1
        return names, +left_out

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        below = self._below(name)
        if anywhere or below is None:
            return []
        full = self._full(below)
        if not self._only and _has_suffix(below) and os.path.isfile(full):
            return [below]  # without listing the folder
        folder, slash, base = below.rpartition("/")
        index = self._index(folder)
        found = [folder + slash + one for key in _keys(base) for one in index.get(key, ())]
        return [path for path in found if not os.path.isdir(self._full(path))]

    def holds(self, name: str) -> bool:
        return self._below(name) is not None

    def read(self, path: str, *, listed: bool) -> bytes:
        real = os.path.realpath(self._full(path))
        if not listed:
            self._check_inside(path, real)
        return read_file(real, self._limits, by_content=listed)

    def _full(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _below(self, name: str) -> str | None:
        """An absolute path relative to the folder; None: it lies elsewhere."""
        if not name.startswith("/"):
            return name
        real = os.path.realpath(self._root)
        for root, path in ((self._root, name), (real, name), (real, os.path.realpath(name))):
            if path.startswith(root.rstrip("/") + "/"):
                return path[len(root.rstrip("/")) + 1 :]
        return None

    def _check_inside(self, path: str, real: str) -> None:
        inside = any(real == root or real.startswith(root + "/") for root in self._roots)
        if not (inside or "/" in self._roots or self._limits.follow_links):
            raise DataError(
                f"outside: {printable(path)} is a link out of {printable(self.where)}; if that is "
                f"meant, set {self._limits.option('follow_links')}: true, or name the folder that "
                f"holds the photo as {self._limits.setting}"
            )

    def _index(self, folder: str) -> dict[str, list[str]]:
        """`_key` of a name -> names in that folder; listed once."""
        if self._only:
            return {} if folder else {_key(self._only): [self._only]}
        with self._lock:
            if folder not in self._indexes:
                self._check_inside(folder, os.path.realpath(self._full(folder)))
                index: dict[str, list[str]] = {}
                try:
                    for name in os.listdir(self._full(folder)):
                        index.setdefault(_key(name), []).append(name)
                except (FileNotFoundError, NotADirectoryError):
                    pass  # not kept: names of folders that are not there may be without number
                else:
                    self._indexes[folder] = index
                return index
            return self._indexes[folder]


class _Zip:
    """The members of a zip file."""

    def __init__(self, path: str, limits: Limits) -> None:
        self.where, self._limits = path, limits
        with _zip_errors(path, limits.setting):
            self._zip = zipfile.ZipFile(path)
            infos = self._zip.infolist()
        self._members: dict[str, list[zipfile.ZipInfo]] = {}
        self._index: dict[str, list[str]] = {}
        for info in infos:
            name = _member_name(info)
            if not name or name.endswith("/") or stat.S_ISLNK(info.external_attr >> 16):
                continue
            self._members.setdefault(name, []).append(info)
            if len(self._members[name]) == 1 and not _is_hidden(name):
                self._index.setdefault(_key(name.rpartition("/")[2]), []).append(name)
        self._overlapping = set(_overlapping(infos))

    def list_names(self) -> tuple[list[str], Counter[str]]:
        names = [name for name in self._members if not _is_hidden(name)]
        hidden = len(self._members) - len(names)
        return names, Counter({"hidden": hidden} if hidden else {})

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        folder, _, base = name.rpartition("/")
        found = [path for key in _keys(base) for path in self._index.get(key, ())]
        if anywhere:
            return [path for path in found if f"/{path}".rpartition("/")[0].endswith(f"/{folder}")
                    or not folder]  # fmt: skip
        return [path for path in found if path.rpartition("/")[0] == folder]

    def holds(self, name: str) -> bool:
        return False

    def read(self, path: str, *, listed: bool) -> bytes:
        if len(self._members[path]) > 1:
            raise DataError(
                f"ambiguous: {self.where} has {len(self._members[path])} members of the name "
                f"{printable(path)}; make the zip again with different names"
            )
        info = self._members[path][0]
        if info.flag_bits & 0x41:
            raise DataError(f"unreadable: {printable(path)} is encrypted; make the zip without")
        if info.compress_type not in _METHODS:
            raise DataError(
                f"unreadable: {printable(path)} is compressed by method {info.compress_type}; make "
                f"the zip with {' or '.join(_METHODS.values())}"
            )
        if info.header_offset in self._overlapping:
            raise DataError(f"unreadable: {printable(path)} overlaps another member of the zip")
        with self._zip.open(info) as file:
            head = file.read(HEAD_BYTES)
            if listed and not _has_suffix(path):
                _check_photo(path, head)
            self._limits.check_size(path, max(info.file_size, info.compress_size))
            data = head + file.read(self._limits.max_bytes + 1 - len(head))
        self._limits.check_size(path, len(data))  # what a header declares may be wrong
        return data


class _Bucket:
    """The objects below a prefix. Two requests a photo: its size, then its bytes."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self.where, self._store, self._limits = store.url, store, limits
        self._sizes: dict[str, int] = {}  # of candidates, until they are read

    def list_names(self) -> tuple[list[str], Counter[str]]:
        keys = self._store.list_keys()
        names = [key for key in keys if not _is_hidden(key)]
        hidden = len(keys) - len(names)
        return names, Counter({"hidden": hidden} if hidden else {})

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        if anywhere or name.startswith("/") or not 0 < len(os.fsencode(name)) <= _LONGEST_KEY:
            return []
        if _has_suffix(name) and self._exists(name):
            return [name]
        # Not the whole listing: only what begins with the name and a dot, in its own case.
        stem = os.path.splitext(name)[0] if _has_suffix(name) else name
        keys = _keys(name)
        found = [key for key in self._store.list_keys(f"{stem}.") if _key(key) in keys]
        return found or ([name] if self._exists(name) else [])

    def holds(self, name: str) -> bool:
        return False

    def read(self, path: str, *, listed: bool) -> bytes:
        size_bytes = self._sizes.pop(path, None)
        if size_bytes is None:
            size_bytes = self._store.size(path)
        if listed and not _has_suffix(path):
            length = min(size_bytes, HEAD_BYTES)
            _check_photo(path, self._store.read(path, length=length))
        self._limits.check_size(path, size_bytes)
        return self._store.read(path)

    def _exists(self, name: str) -> bool:
        try:
            self._sizes[name] = self._store.size(name)
        except NotFoundError:
            return False
        return True


def _open_place(place: str, limits: Limits, roots: list[str]) -> _Place:
    store = open_store(place)
    if store.local_path("any") is None:
        return _Bucket(store, limits)
    path = store.url
    if os.path.isdir(path):
        return _Folder(path, limits, roots)
    if not os.path.isfile(path):
        raise ConfigError(
            f"{limits.setting} {place}: no such folder or file; give a folder of photos, a zip, "
            "or s3://"
        )
    with open(path, "rb") as file:
        if photo_format(file.read(HEAD_BYTES)) is not None:
            return _Folder(os.path.dirname(path), limits, roots, only=os.path.basename(path))
    if zipfile.is_zipfile(path):
        return _Zip(path, limits)
    raise ConfigError(
        f"{limits.setting} {place}: it is a file, but no photo and no zip that is whole; give a "
        "folder of photos, a zip, a photo, or s3:// (a table of photos is given as predict.table)"
    )


def _choose(name: str, found: Sequence[str], *, where: str) -> str | None:
    """The file that a name means: its own, then with a suffix, then in another case.

    A name without a suffix is rather that of a photo with one.

    Raises:
        DataError: `ambiguous: ...`, several files are meant equally well.
    """
    base = name.rpartition("/")[2]
    bases = [(path, path.rpartition("/")[2]) for path in found]
    exact = [path for path, one in bases if one == base]
    suffixed = [
        path for path, one in bases if one.startswith(base) and one[len(base) :].lower() in SUFFIXES
    ]
    known = [path for path, one in bases if _has_suffix(one) or _key(one) == _key(base)]
    tiers = [exact, suffixed] if _has_suffix(base) else [suffixed, exact]
    for tier in (*tiers, known, found):
        if len(tier) > 1:
            raise DataError(
                f"ambiguous: {printable(name)} names both {printable(tier[0])} and "
                f"{printable(tier[1])} in {printable(where)}; write the path with its suffix"
            )
        if tier:
            return tier[0]
    return None


def _forms(name: str) -> list[str]:
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


@contextmanager
def _named_errors(name: str, where: str) -> Iterator[None]:
    """Reasons for what reading raises, besides `DataError`s of ours and a store's trouble."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, NotFoundError):
        raise MissingPhotoError(
            f"missing: no such photo in {printable(where)}: tried {printable(name)}"
        ) from None
    except (StorageError, DataError):
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
            struct.error, MemoryError) as error:  # fmt: skip
        why = getattr(error, "strerror", None) or error
        raise DataError(f"unreadable: {printable(name)}: {printable(str(why))}") from None


@contextmanager
def _zip_errors(path: str, setting: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, zipfile.BadZipFile, struct.error) as e:
        raise DataError(
            f"{setting} {path}: the zip is damaged ({printable(str(e))}); make it again"
        ) from None


def _member_name(info: zipfile.ZipInfo) -> str:
    """A member's path with `/`; some tools write `\\`, or UTF-8 without the flag for it."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    name = name.replace("\\", "/")
    return "/".join(part for part in name.lstrip("/").split("/") if part != ".")


def _overlapping(infos: Iterable[zipfile.ZipInfo]) -> Iterator[int]:
    """Offsets of members whose bytes lie in those of another, as in zip bombs."""
    end, last = 0, -1
    for info in sorted(infos, key=lambda one: one.header_offset):
        if info.header_offset < end:
            yield from (last, info.header_offset)
        if (ends := info.header_offset + _HEADER_BYTES + info.compress_size) > end:
            end, last = ends, info.header_offset


def _kind(entry: "os.DirEntry[str]") -> int:
    """File type of an entry, links followed; one that leads nowhere counts as a regular file."""
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    try:
        return stat.S_IFMT(entry.stat().st_mode)
    except OSError:
        return stat.S_IFREG  # reading it says why not


def _check_regular(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(mode):
        raise DataError(f"not a file: {printable(path)} is a device, a pipe or a socket")


def _check_photo(path: str, head: bytes) -> None:
    if not _has_suffix(path) and photo_format(head) is None:
        raise DataError(f"{LEFT_OUT}: not a photo")


def _has_suffix(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _key(name: str) -> str:
    """A name without case, and composed: macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name).casefold()


def _keys(base: str) -> set[str]:
    key = _key(base)
    return {key, *(key + suffix for suffix in SUFFIXES + UNREAD_SUFFIXES)} if base else set()


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
