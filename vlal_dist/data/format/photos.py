"""Photos by name, from folders, zip files and buckets; for pack and predict."""

import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vlal_dist.errors import ConfigError, DataError, NotFoundError, StorageError
from vlal_dist.storage.store import open_store

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PACK_SUFFIXES = (".jpg", ".jpeg", ".png")
"""What pack appends to an image id, in this order."""


class MissingPhotoError(DataError):
    """No photo of that name."""


class Photos:
    """The photos of one place; safe to read from many threads.

    A name is a path below the folder (or an absolute path), a member of the zip or its file name
    alone, or a key of the bucket.

    Args:
        place: folder, zip file or `s3://bucket/prefix`.
        setting: the key of the configuration that names it, for errors.

    Raises:
        ConfigError: neither a folder nor a zip is there.
    """

    def __init__(self, place: str, *, setting: str) -> None:
        self._place, self._store = place, open_store(place)
        self._folder: Path | None = None
        self._zip: zipfile.ZipFile | None = None
        self._members: dict[str, str] = {}
        if self._store.local_path("any") is None:
            return
        path = Path(self._store.url)
        if path.is_dir():
            self._folder = path
        elif path.is_file() and zipfile.is_zipfile(path):
            self._zip = zipfile.ZipFile(path)
            members = [name for name in self._zip.namelist() if not name.endswith("/")]
            for name in members:
                self._members.setdefault(name.rsplit("/", 1)[-1], name)
            self._members |= {name: name for name in members}
        else:
            hint = "it is a file" if path.is_file() else "no such folder or file"
            raise ConfigError(
                f"{setting} {place}: {hint}; give a folder of photos, a zip, or s3:// "
                "(a table of photos is given as predict.table)"
            )

    def names(self) -> list[str]:
        """All photos, sorted, by suffix; hidden files and folders are left out."""
        names = self._store.list_keys() if self._zip is None else set(self._members.values())
        return sorted(name for name in names if _is_photo(name))

    def read(self, name: str) -> bytes:
        """A photo's file.

        Raises:
            MissingPhotoError: `missing: ...`, no such photo.
            DataError: `unreadable: ...`, it is there but damaged.
            StorageError: the bucket cannot be read.
        """
        try:
            if self._zip is not None:
                return self._zip.read(self._members[name])
            if self._folder is not None:
                return (self._folder / name).read_bytes()
            return self._store.read(name)
        except (KeyError, FileNotFoundError, NotADirectoryError, IsADirectoryError, NotFoundError):
            raise MissingPhotoError(f"missing: no such photo in {self._place}") from None
        except StorageError:
            raise
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as e:
            why = getattr(e, "strerror", None) or e
            raise DataError(f"unreadable: {name[:100]}: {why}") from None


def find_photo(places: Sequence[Photos], image_id: str) -> bytes:
    """The photo `{image_id}.jpg`, `.jpeg` or `.png` of the first place that holds one.

    Raises:
        MissingPhotoError: no place does.
        DataError, StorageError: as `Photos.read`.
    """
    for place in places:
        for suffix in PACK_SUFFIXES:
            with suppress(MissingPhotoError):
                return place.read(image_id + suffix)
    raise MissingPhotoError("missing: no such photo in pack.images")


def _is_photo(name: str) -> bool:
    folders = name.split("/")
    hidden = any(one.startswith((".", "__MACOSX")) for one in folders)
    return name.lower().endswith(SUFFIXES) and not hidden
