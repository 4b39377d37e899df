"""Photos by name: a folder with all below it, a zip file, or a prefix of a bucket."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.storage.store import Store, open_store

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Photos(Protocol):
    """Reads photos; safe to use from many threads."""

    def names(self) -> list[str]:
        """All photos, sorted, by suffix; hidden files and folders are left out."""
        ...

    def read(self, name: str) -> bytes:
        """A photo's file; DataError (`missing: ...`, `unreadable: ...`) if it cannot be had."""
        ...


def open_photos(place: str, *, key: str) -> Photos:
    """Photos of a folder, a zip or `s3://bucket/prefix`.

    Args:
        place: path or URL.
        key: the setting that named it, for errors.

    Raises:
        ConfigError: neither a folder nor a zip is there.
    """
    store = open_store(place)
    if store.local_path("any") is None:
        return _Bucket(store)
    path = Path(store.url)
    if path.is_dir():
        return _Folder(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return _Zip(path)
    hint = "it is a file; a table is given as predict.table" if path.is_file() else "no such folder"
    raise ConfigError(f"{key} {place}: {hint}; give a folder of photos, a zip, or s3://")


class _Folder:
    """Names are paths below the folder; an absolute name is read where it says."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        found = []
        for folder, below, files in os.walk(self._path):
            below[:] = [name for name in below if not name.startswith(".")]
            here = Path(folder).relative_to(self._path)
            found += [(here / name).as_posix() for name in files if _is_photo(name)]
        return sorted(found)

    def read(self, name: str) -> bytes:
        try:
            return (self._path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DataError(f"missing: no such file in {self._path}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"unreadable: {getattr(error, 'strerror', error)}") from None


class _Zip:
    """Names are members, or file names wherever in the archive they lie."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        members = [name for name in self._archive.namelist() if not name.endswith("/")]
        self._photos = sorted(
            name
            for name in members
            if _is_photo(name.rsplit("/", 1)[-1]) and "__MACOSX" not in name
        )
        self._members: dict[str, str] = {}
        for name in members:
            self._members.setdefault(name.rsplit("/", 1)[-1], name)
        self._members |= {name: name for name in members}

    def names(self) -> list[str]:
        return self._photos

    def read(self, name: str) -> bytes:
        member = self._members.get(name)
        if member is None:
            raise DataError(f"missing: no such member in {self._archive.filename}")
        try:
            return self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
            raise DataError(f"unreadable: {error}") from None


class _Bucket:
    def __init__(self, store: Store) -> None:
        self._store = store

    def names(self) -> list[str]:
        return [key for key in self._store.list_keys() if _is_photo(key.rsplit("/", 1)[-1])]

    def read(self, name: str) -> bytes:
        try:
            return self._store.read(name)
        except NotFoundError:
            raise DataError(f"missing: no such object in {self._store.url}") from None
        except DataError as error:
            raise DataError(f"unreadable: {error}") from None


def _is_photo(file_name: str) -> bool:
    return file_name.lower().endswith(SUFFIXES) and not file_name.startswith(".")
