"""Store on a local or shared POSIX file system, and atomic replacement of single files."""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlal_dist.errors import NotFoundError
from vlal_dist.storage.checks import (
    ABSENT,
    TEMPORARY_PREFIX,
    check_key,
    check_prefix,
    check_range,
    chunks_of,
    conflict,
    sha256_of,
    short_read,
    translated_errors,
)


class LocalStore:
    """Files under one folder; implements `vlal_dist.storage.store.Store`.

    Symbolic links to files are read and listed, links to folders are not descended into.

    Args:
        root: the folder; made at the first write.
    """

    def __init__(self, root: Path) -> None:
        # Absolute, because worker processes may be started in another folder.
        self._root = Path(os.path.abspath(root))
        self.url = str(self._root)

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.read`."""
        path = self._path(key)
        check_range(key, offset, length)
        with translated_errors(path), path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
            size_bytes = os.fstat(file.fileno()).st_size
        if offset > size_bytes or (length is not None and len(data) < length):
            raise short_read(self.url, key, offset=offset, length=length, size_bytes=size_bytes)
        return data

    def size(self, key: str) -> int:
        """See `Store.size`."""
        path = self._path(key)
        with translated_errors(path):
            found = path.stat()
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            return found.st_size

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def create(self, key: str, data: bytes | Path) -> bool:
        """See `Store.create`: a finished file gets its final name by link(2), which never replaces.

        Raises:
            StorageError: also where the file system has no hard links.
        """
        path = self._path(key)
        with translated_errors(path):
            if not path.is_file():
                given, created = self._link_new(path, data)
                if created:
                    return True
            else:
                given = sha256_of(data)
            existing = sha256_of(path)
        if existing != given:
            raise conflict(self.url, key, existing=existing, given=given)
        return False

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        path = self._path(key)
        with translated_errors(path), replacing(path) as temporary:
            temporary.write_bytes(data)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        path = self._path(key)
        with translated_errors(path), suppress(FileNotFoundError):
            path.unlink()

    def list_keys(self, prefix: str = "") -> list[str]:
        """See `Store.list_keys`."""
        folder, _, _ = check_prefix(prefix).rpartition("/")
        keys = []
        with translated_errors(self._root / folder):
            for directory, _, names in os.walk(self._root / folder, onerror=_raise_unless_absent):
                below = Path(directory).relative_to(self._root).as_posix()
                parent = "" if below == "." else f"{below}/"
                keys += [parent + name for name in names if not name.startswith(TEMPORARY_PREFIX)]
        return sorted(key for key in keys if key.startswith(prefix))

    def sweep(self, folder: str) -> None:
        """See `Store.sweep`."""
        top = self._path(folder)
        with translated_errors(top):
            for directory, _, names in os.walk(top, topdown=False):
                for name in names:
                    if name.startswith(TEMPORARY_PREFIX):
                        Path(directory, name).unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    os.rmdir(directory)

    def local_path(self, key: str) -> Path | None:
        """See `Store.local_path`; the file need not exist."""
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _link_new(self, path: Path, data: bytes | Path) -> tuple[str, bool]:
        """Write, then name; returns the sha256 of `data` and whether the name was still free."""
        with _temporary_beside(path) as temporary:
            sha256 = hashlib.sha256()
            # A source file is copied, never linked: its owner may still change it.
            with temporary.open("xb") as file:
                for chunk in chunks_of(data):
                    file.write(chunk)
                    sha256.update(chunk)
            _sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return sha256.hexdigest(), False
        _sync(path.parent)
        return sha256.hexdigest(), True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file atomically: yields a temporary name to write, which then becomes `path`.

    Missing folders are made; content and name are flushed to disk. If the block raises, `path`
    stays as it was. The temporary name has no suffix, so no collector of files by suffix reads it.

    Raises:
        OSError: it could not be written.
    """
    with _temporary_beside(path) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A new name in the folder of `path` (which is made), removed at the end if still there.

    A killed process leaves it behind: harmless, hidden from listings, never reused.
    """
    make_folder(path.parent)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Like mkdir -p, but each new folder's entry is on disk before anything is put into it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_absent(error: OSError) -> None:
    """A folder that is not there (or is a file) holds no keys; any other error is one."""
    if error.errno not in ABSENT:
        raise error
