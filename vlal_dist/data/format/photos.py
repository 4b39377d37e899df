"""Photos by name, from folders, zip files, tars, tables and buckets; for pack and predict.

A name leads to a regular file below a named place, within a limit of bytes, or to an error whose
text begins with the reason.
"""

import os
import struct
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from vlal_dist.data.format.images import HEAD_BYTES, photo_format
from vlal_dist.data.format.photo_names import (
    LEFT_OUT,
    MAX_BYTES,
    SUFFIXES,
    Limits,
    MissingPhotoError,
    Place,
    choose,
    has_suffix,
    name_forms,
    printable,
)
from vlal_dist.data.format.photo_places import Bucket, Folder, Zip, read_file
from vlal_dist.data.format.photo_tables import MAGIC, Tables
from vlal_dist.data.format.photo_tables import SUFFIXES as TABLE_SUFFIXES
from vlal_dist.data.format.photo_tars import Tars
from vlal_dist.data.format.tar import is_tar
from vlal_dist.errors import ConfigError, DataError, NotFoundError, StorageError
from vlal_dist.storage.store import open_store

__all__ = [
    "LEFT_OUT",
    "MAX_BYTES",
    "Limits",
    "MissingPhotoError",
    "Photos",
    "printable",
    "read_file",
]


class Photos:
    """The photos of one or several places; safe to read from many threads.

    A name is a path below a folder (or an absolute path of a file below it), a member of a zip or
    the end of its path, a key of a bucket, `TAR/MEMBER` of tars, of which the member is enough, or
    what `row_names` calls the row of a table, with or without `FILE/` before it. Without a suffix
    it stands for the photo with that name and any of `SUFFIXES`. The first place that holds a name
    is used.

    Args:
        places: folders, zip files, single photos, `s3://bucket/prefix`; tars, local or
            `s3://bucket/key.tar`, several by a pattern such as `shards/*.tar`; Parquet in the same
            ways, and local Arrow files.
        limits: what may be read.

    Attributes:
        left_out: files that the listing leaves out, by reason.

    Raises:
        ConfigError: nothing that can hold photos is there.
        DataError: a zip, tar or table is damaged.
    """

    def __init__(self, places: Sequence[str], limits: Limits) -> None:
        self.left_out: Counter[str] = Counter()
        roots: list[str] = []  # real paths that links may lead to, filled by the folders
        self._places = [_open_place(place, limits, roots) for place in places]
        self._limits, self._listed = limits, frozenset[str]()
        self._is_remote = any(open_store(place).local_path("any") is None for place in places)

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
        place, path = self.find(name)
        with _named_errors(name, place.where):
            return place.read(path, listed=False)

    def find(self, name: str) -> tuple[Place, str]:
        """The place that holds what `name` leads to, and the file's path there.

        Raises:
            MissingPhotoError, DataError, StorageError: as `read`.
        """
        forms = name_forms(name)
        for place in self._places:
            with _named_errors(name, place.where):
                for form, anywhere in ((f, a) for a in (False, True) for f in forms):
                    found = place.candidates(form, anywhere=anywhere)
                    if path := choose(form, found, where=place.where):
                        return place, path
        where = printable(", ".join(place.where for place in self._places))
        if name.startswith("/") and not any(place.holds(name) for place in self._places):
            raise DataError(
                f"outside: {printable(name)} is not below {where}; name a folder that holds it as "
                f"{self._limits.setting}"
            )
        tried = f"tried {printable(forms[0])}"
        if not has_suffix(forms[0]):
            tried += f", and {printable(forms[0])} followed by {' '.join(SUFFIXES)} in any case"
        raise MissingPhotoError(f"missing: no such photo in {where}: {tried}")

    def read_each(self, names: Iterable[str]) -> Iterator[bytes | DataError]:
        """What `read` returns or raises for each name, in order; from buckets a few ahead.

        Raises:
            StorageError: the bucket cannot be read.
        """
        if not self._is_remote:
            yield from map(self._read_or_error, names)
            return
        ahead = deque[Future[bytes | DataError]]()
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="photo")
        try:
            for name in names:
                ahead.append(pool.submit(self._read_or_error, name))
                if len(ahead) > _READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read_or_error(self, name: str) -> bytes | DataError:
        try:
            return self.read(name)
        except DataError as error:
            return error


_READERS = 8
"""Photos of a bucket that are read at a time; also the most that wait in memory, by process."""


def _open_place(place: str, limits: Limits, roots: list[str]) -> Place:
    store = open_store(place)
    remote = store.local_path("any") is None
    pattern = any(mark in place for mark in "*?[")
    if remote or (pattern and not os.path.exists(store.url)):
        if place.lower().endswith(".tar"):
            return Tars(store.url, limits)
        if place.lower().endswith(TABLE_SUFFIXES):
            return Tables(store.url, limits)
        if not pattern:
            return Bucket(store, limits)
        raise ConfigError(
            f"{limits.setting} {place}: a pattern names tars or tables, it ends in .tar or "
            f"{' or '.join(TABLE_SUFFIXES)}; {_KINDS}"
        )
    path = store.url
    if os.path.isdir(path):
        return Folder(path, limits, roots)
    if not os.path.isfile(path):
        raise ConfigError(f"{limits.setting} {place}: no such folder or file; {_KINDS}")
    with open(path, "rb") as file:
        head = file.read(512)
    if photo_format(head[:HEAD_BYTES]) is not None:
        return Folder(os.path.dirname(path), limits, roots, only=os.path.basename(path))
    if is_tar(head) or path.lower().endswith(".tar"):
        return Tars(path, limits)
    if zipfile.is_zipfile(path):
        return Zip(path, limits)
    if head.startswith(MAGIC):
        return Tables(path, limits)
    raise ConfigError(
        f"{limits.setting} {place}: it is a file, but no photo and no zip, tar or table that is "
        f"whole; {_KINDS} (a table of requests is given as predict.table)"
    )


_KINDS = "give a folder of photos, a zip, a tar, a Parquet file with the photos, a single photo, or s3://"


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
