"""Places that hold photos as files: a folder, a zip, a bucket; files that hold many photos."""

import os
import stat
import struct
import threading
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vlal_dist.data.format.images import HEAD_BYTES
from vlal_dist.data.format.photo_names import (
    Limits,
    check_photo,
    has_suffix,
    is_hidden,
    name_key,
    name_keys,
    printable,
)
from vlal_dist.errors import ConfigError, DataError, NotFoundError, StorageError
from vlal_dist.storage.checks import TEMPORARY_PREFIX
from vlal_dist.storage.store import Store, find_files

_HEADER_BYTES = 30
"""The fixed part of a zip member's header."""
_LONGEST_KEY = 1000
"""Bytes of an object's name; S3 has 1,024 with the prefix, and answers with an error above."""
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate"}
"""Compression of zip members; only these are unpacked piece by piece, within a limit."""


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
            check_photo(path, head)
        limits.check_size(path, found.st_size)
        pieces = [head]
        left = found.st_size - len(head)
        while left > 0 and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


class Folder:
    """A folder, or a single file of it."""

    def __init__(self, root: str, limits: Limits, roots: list[str], *, only: str = "") -> None:
        self.where = os.path.join(root, only) if only else root
        self._root, self._limits, self._only = os.path.abspath(root), limits, only
        self._roots = roots
        roots.append(os.path.realpath(self.where))
        self._indexes: dict[str, dict[str, list[str]]] = {}
        self._lock = threading.Lock()

    def list_names(self) -> tuple[list[str], Counter[str]]:
        """See `Place.list_names`."""
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
                if is_hidden(entry.name):
                    left_out["hidden"] += not entry.name.startswith(TEMPORARY_PREFIX)
                elif kind == stat.S_IFDIR:
                    (links if entry.is_symlink() else folders).append(path)
                elif kind == stat.S_IFREG:
                    names.append(path)
                else:
                    left_out["special file"] += 1
        return names, +left_out

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        """See `Place.candidates`."""
        below = self._below(name)
        if anywhere or below is None:
            return []
        full = self._full(below)
        if not self._only and has_suffix(below) and os.path.isfile(full):
            return [below]  # without listing the folder
        folder, slash, base = below.rpartition("/")
        index = self._index(folder)
        found = [folder + slash + one for key in name_keys(base) for one in index.get(key, ())]
        return [path for path in found if not os.path.isdir(self._full(path))]

    def holds(self, name: str) -> bool:
        """See `Place.holds`."""
        return self._below(name) is not None

    def read(self, path: str, *, listed: bool) -> bytes:
        """See `Place.read`."""
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
        """`name_key` of a name -> names in that folder; listed once."""
        if self._only:
            return {} if folder else {name_key(self._only): [self._only]}
        with self._lock:
            if folder not in self._indexes:
                self._check_inside(folder, os.path.realpath(self._full(folder)))
                index: dict[str, list[str]] = {}
                try:
                    for name in os.listdir(self._full(folder)):
                        index.setdefault(name_key(name), []).append(name)
                except (FileNotFoundError, NotADirectoryError):
                    pass  # not kept: names of folders that are not there may be without number
                else:
                    self._indexes[folder] = index
                return index
            return self._indexes[folder]


class Zip:
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
            if len(self._members[name]) == 1 and not is_hidden(name):
                self._index.setdefault(name_key(name.rpartition("/")[2]), []).append(name)
        self._overlapping = set(_overlapping(infos))

    def list_names(self) -> tuple[list[str], Counter[str]]:
        """See `Place.list_names`."""
        names = [name for name in self._members if not is_hidden(name)]
        hidden = len(self._members) - len(names)
        return names, Counter({"hidden": hidden} if hidden else {})

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        """See `Place.candidates`."""
        folder, _, base = name.rpartition("/")
        found = [path for key in name_keys(base) for path in self._index.get(key, ())]
        if anywhere:
            return [path for path in found if f"/{path}".rpartition("/")[0].endswith(f"/{folder}")
                    or not folder]  # fmt: skip
        return [path for path in found if path.rpartition("/")[0] == folder]

    def holds(self, name: str) -> bool:
        """See `Place.holds`."""
        return False

    def read(self, path: str, *, listed: bool) -> bytes:
        """See `Place.read`."""
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
            if listed and not has_suffix(path):
                check_photo(path, head)
            self._limits.check_size(path, max(info.file_size, info.compress_size))
            data = head + file.read(self._limits.max_bytes + 1 - len(head))
        self._limits.check_size(path, len(data))  # what a header declares may be wrong
        return data


class Bucket:
    """The objects below a prefix. Two requests a photo: its size, then its bytes."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self.where, self._store, self._limits = store.url, store, limits
        self._sizes: dict[str, int] = {}  # of candidates, until they are read

    def list_names(self) -> tuple[list[str], Counter[str]]:
        """See `Place.list_names`."""
        keys = self._store.list_keys()
        names = [key for key in keys if not is_hidden(key)]
        hidden = len(keys) - len(names)
        return names, Counter({"hidden": hidden} if hidden else {})

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        """See `Place.candidates`."""
        if anywhere or name.startswith("/") or not 0 < len(os.fsencode(name)) <= _LONGEST_KEY:
            return []
        if has_suffix(name) and self._exists(name):
            return [name]
        # Not the whole listing: only what begins with the name and a dot, in its own case.
        stem = os.path.splitext(name)[0] if has_suffix(name) else name
        keys = name_keys(name)
        found = [key for key in self._store.list_keys(f"{stem}.") if name_key(key) in keys]
        return found or ([name] if self._exists(name) else [])

    def holds(self, name: str) -> bool:
        """See `Place.holds`."""
        return False

    def read(self, path: str, *, listed: bool) -> bytes:
        """See `Place.read`."""
        size_bytes = self._sizes.pop(path, None)
        if size_bytes is None:
            size_bytes = self._store.size(path)
        if listed and not has_suffix(path):
            length = min(size_bytes, HEAD_BYTES)
            check_photo(path, self._store.read(path, length=length))
        self._limits.check_size(path, size_bytes)
        return self._store.read(path)

    def _exists(self, name: str) -> bool:
        try:
            self._sizes[name] = self._store.size(name)
        except NotFoundError:
            return False
        return True


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


@dataclass(frozen=True)
class ContainerFile:
    """A file that holds photos, as it was when its size was asked for.

    Attributes:
        name: of the file, without folders and suffix; begins the names of its photos.
        store, key: where it is.
        size_bytes: of the file.
        changed_ns: time of change of a local file; None: an object, whose version the store checks.
    """

    name: str
    store: Store
    key: str
    size_bytes: int
    changed_ns: int | None

    @property
    def url(self) -> str:
        """Path or URL, for messages."""
        return f"{self.store.url.rstrip('/')}/{self.key}"

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file.

        Raises:
            DataError: the file is another one by now.
            StorageError: it cannot be read.
        """
        if self.changed_ns is not None and _state(self.store, self.key) != (
            self.size_bytes,
            self.changed_ns,
        ):
            raise DataError(f"unreadable: {printable(self.url)} has changed; repeat the command")
        return self.store.read(self.key, offset=offset, length=size)


def find_containers(place: str, setting: str) -> list[tuple[str, Store, str, int, int | None]]:
    """Fields of a `ContainerFile` for each file that a path, URL or pattern names, by name.

    Raises:
        ConfigError: there is none, or two have the same name.
    """
    found: dict[str, tuple[str, Store, str, int, int | None]] = {}
    for store, key in find_files(place):
        name = os.path.splitext(key.rpartition("/")[2])[0]
        one = (name, store, key, *_state(store, key))
        if (other := found.setdefault(name, one)) is not one:
            paths = " and ".join(ContainerFile(*two).url for two in (other, one))
            raise ConfigError(
                f"{setting} {place}: {paths} would give their photos the same names ({name}/...); "
                "rename one, or give them as two places"
            )
    if not found:
        raise ConfigError(f"{setting} {place}: no such file; correct the path or the pattern")
    return [found[name] for name in sorted(found)]


def _state(store: Store, key: str) -> tuple[int, int | None]:
    """Size in bytes, and of a local file the time of its last change."""
    local = store.local_path(key)
    if local is None:
        return store.size(key), None
    found = local.stat()
    return found.st_size, found.st_mtime_ns
