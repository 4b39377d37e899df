"""Where photos come from: folders and zip files, searched in order for `{image_id}.jpg`."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from vlal_dist.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")


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
        self._places: list[Path | _Zip] = []
        for place in places:
            path = Path(place)
            if path.is_dir():
                self._places.append(path)
            elif path.is_file():
                self._places.append(_Zip(path))
            else:
                raise DataError(f"pack.images: {place} does not exist; correct the path")

    def read(self, image_id: str) -> bytes | None:
        """The photo's file bytes, or None when no place holds it.

        Raises:
            DataError: it is there and cannot be read.
        """
        for place in self._places:
            for suffix in SUFFIXES:
                name = f"{image_id}{suffix}"
                data = place.read(name) if isinstance(place, _Zip) else _read_file(place / name)
                if data is not None:
                    return data
        return None


class _Zip:
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
