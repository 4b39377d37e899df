"""Where photos come from: folders and zip files, searched in order for `{image_id}.jpg`."""

import zipfile
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
        self._folders: list[Path] = []
        self._members: dict[str, tuple[zipfile.ZipFile, str]] = {}
        for place in places:
            path = Path(place)
            if path.is_dir():
                self._folders.append(path)
            elif path.is_file():
                self._open_zip(path)
            else:
                raise DataError(f"pack.images: {place} does not exist; correct the path")

    def read(self, image_id: str) -> bytes | None:
        """The photo's file bytes, or None when no place holds it."""
        for suffix in SUFFIXES:
            for folder in self._folders:
                path = folder / f"{image_id}{suffix}"
                if path.parent == folder and path.is_file():
                    return path.read_bytes()
            found = self._members.get(f"{image_id}{suffix}")
            if found is not None:
                archive, member = found
                try:
                    return archive.read(member)
                except (zipfile.BadZipFile, OSError, EOFError) as error:
                    raise DataError(f"damaged in {archive.filename}: {error}") from None
        return None

    def _open_zip(self, path: Path) -> None:
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"pack.images: {path} is no zip file: {error}") from None
        for member in archive.namelist():
            self._members.setdefault(member.rsplit("/", 1)[-1], (archive, member))
