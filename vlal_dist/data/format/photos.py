"""Read photos by name from folders, zip files and buckets."""

import os
import zipfile
import zlib
from collections.abc import Sequence
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


PACK_SUFFIXES = (".jpg", ".jpeg", ".png")


class PhotoSource:
    """Reads photos by image id.

    Zip files are read in place (Visual Genome's downloads): members are found by their file name,
    whatever folder they lie in.

    Args:
        places: folders or zip files, searched in order.
    """

    def __init__(self, places: Sequence[str]) -> None:
        if not places:
            raise DataError("pack.images is empty; name the folder or zip that holds the photos")
        self._places: list[Path | _ZipByFileName] = []
        for place in places:
            path = Path(place)
            if path.is_dir():
                self._places.append(path)
            elif path.is_file():
                self._places.append(_ZipByFileName(path))
            else:
                raise DataError(f"pack.images: {place} does not exist; correct the path")

    def read(self, image_id: str) -> bytes | None:
        """The photo's file bytes, or None when no place holds it.

        Raises:
            DataError: it is there and cannot be read.
        """
        for place in self._places:
            for suffix in PACK_SUFFIXES:
                name = f"{image_id}{suffix}"
                data = (
                    place.read(name)
                    if isinstance(place, _ZipByFileName)
                    else _read_file(place / name)
                )
                if data is not None:
                    return data
        return None


class _ZipByFileName:
    """A zip file and its members by file name."""

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"pack.images: {path} is no zip file: {error}") from None
        self._members: dict[str, str] = {}
        for member in self._archive.namelist():
            self._members.setdefault(member.rsplit("/", 1)[-1], member)

    def read(self, name: str) -> bytes | None:
        member = self._members.get(name)
        if member is None:
            return None
        try:
            return self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
            raise DataError(f"unreadable: {member} in {self._archive.filename}: {error}") from None


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise DataError(f"unreadable: {path.name[:100]}: {error.strerror}") from None
