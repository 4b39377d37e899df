"""Photos in tars: local files and objects, read in place.

Headers are read once, in large pieces; each photo is one ranged read. Nothing is extracted.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice, repeat
from pathlib import Path

import pyarrow as pa

from vlal_dist.data.format.images import HEAD_BYTES
from vlal_dist.data.format.index import ARROW_ERRORS, decode_table, encode_table
from vlal_dist.data.format.photo_names import (
    Limits,
    MemberIndex,
    check_photo,
    has_suffix,
    printable,
)
from vlal_dist.data.format.photo_places import ContainerFile, find_containers
from vlal_dist.data.format.tar import BLOCK, ForeignMember, walk_tar
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.storage.checks import translated_errors
from vlal_dist.storage.local import replacing

MAX_MEMBERS = 50_000_000
"""Members of the tars of one place; their names take about 5 GB of memory."""
_REMOTE_PIECE = 4 << 20
"""Bytes of a read of headers from a bucket: what is skipped must outweigh a request's wait."""
_LOCAL_PIECE = 16 << 10
_LISTING_THREADS = 8
_LISTING = pa.schema(
    [("name", pa.binary()), ("offset", pa.int64()), ("size", pa.int64()), ("kind", pa.string())]
)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Tar(ContainerFile):
    """One tar."""

    def members(self) -> Iterator[ForeignMember]:
        """Its members in order, links and folders included; see `walk_tar`.

        Raises:
            DataError: damaged or compressed; members before the damage were given already.
            StorageError: it cannot be read.
        """
        piece = _REMOTE_PIECE if self.changed_ns is None else _LOCAL_PIECE
        read = _in_pieces(self.read, self.size_bytes, piece)
        for magic, method in _COMPRESSED.items():
            if read(0, BLOCK).startswith(magic):
                raise DataError(
                    f"{printable(self.url)} is compressed ({method}), so that no photo can be read "
                    "by itself; unpack it to a plain .tar"
                )
        try:
            yield from walk_tar(read, self.size_bytes)
        except DataError as error:
            raise DataError(f"{printable(self.url)} is {error}") from None


def find_tars(place: str, setting: str) -> list[Tar]:
    """The tars that a path, URL or pattern names, sorted by name; see `find_containers`."""
    return [Tar(*found) for found in find_containers(place, setting)]


def _in_pieces(
    read: Callable[[int, int], bytes], size_bytes: int, piece: int
) -> Callable[[int, int], bytes]:
    """Reads that are answered from the last piece where it holds them."""
    held, start = b"", 0

    def read_held(offset: int, length: int) -> bytes:
        nonlocal held, start
        length = min(length, size_bytes - offset)
        if not start <= offset <= offset + length <= start + len(held):
            held = read(offset, min(max(piece, length), size_bytes - offset))
            start = offset
        return held[offset - start : offset - start + length]

    return read_held


def _all_members(tar: Tar, limits: Limits) -> Sequence[ForeignMember]:
    """The members of a tar, which one of the processes of a command lists for all of them."""
    if not (limits.cache and limits.command):
        return list(islice(tar.members(), MAX_MEMBERS + 1))
    digest = hashlib.sha256(f"{tar.url}\0{tar.size_bytes}\0{tar.changed_ns}".encode()).hexdigest()[
        :32
    ]
    folder = Path(limits.cache) / "photos"
    path = folder / f"{digest}-{limits.command}.tar.parquet"
    with suppress(*ARROW_ERRORS):  # not there yet
        rows = decode_table(path, _LISTING, where=str(path)).to_pylist()
        return [
            ForeignMember(row["name"].decode("utf-8", "surrogatepass"), *list(row.values())[1:])
            for row in rows
        ]
    members = list(islice(tar.members(), MAX_MEMBERS + 1))
    columns = {
        "name": [member.name.encode("utf-8", "surrogatepass") for member in members],
        "offset": [member.offset for member in members],
        "size": [member.size for member in members],
        "kind": [member.kind for member in members],
    }
    with translated_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob(f"{digest}-*.tar.parquet"):  # of another command
            earlier.unlink(missing_ok=True)
    with translated_errors(path), replacing(path) as temporary:
        temporary.write_bytes(encode_table(columns, _LISTING))
    return members


class Tars:
    """The members of one or several tars; see `vlal_dist.data.format.photo_names.Place`."""

    def __init__(self, place: str, limits: Limits) -> None:
        self.where, self._limits = place, limits
        self._tars = find_tars(place, limits.setting)
        self._index = MemberIndex([tar.name for tar in self._tars])
        self._left_out = Counter[str]()
        # A few at a time: the lists of all would take much more memory than the index.
        at_once = _LISTING_THREADS if self._tars[0].changed_ns is None else 1
        with ThreadPoolExecutor(at_once) as pool:
            for first in range(0, len(self._tars), at_once):
                some = self._tars[first : first + at_once]
                listed = pool.map(_all_members, some, repeat(limits))
                for number, members in enumerate(listed, first):
                    self._add(number, members)
        self._left_out["hidden"] = self._index.hidden

    def _add(self, number: int, members: Sequence[ForeignMember]) -> None:
        for member in members:
            if member.kind:
                self._left_out[member.kind] += member.kind != "folder"
            else:
                self._index.add(number, member.name, member.offset, member.size)
        if len(self._index) > MAX_MEMBERS:
            raise ConfigError(
                f"{self._limits.setting} {self.where}: more than {MAX_MEMBERS} members; give fewer "
                "tars at a time"
            )

    def list_names(self) -> tuple[list[str], Counter[str]]:
        """See `Place.list_names`."""
        return self._index.paths(), +self._left_out

    def candidates(self, name: str, *, anywhere: bool) -> list[str]:
        """See `Place.candidates`."""
        return self._index.candidates(name, anywhere=anywhere)

    def holds(self, name: str) -> bool:
        """See `Place.holds`."""
        return False

    def read(self, path: str, *, listed: bool) -> bytes:
        """See `Place.read`."""
        tar, offset, size = self.locate(path)
        if listed and not has_suffix(path):
            check_photo(path, tar.read(offset, min(size, HEAD_BYTES)))
        self._limits.check_size(path, size)
        return tar.read(offset, size)

    def locate(self, path: str) -> tuple[Tar, int, int]:
        """The tar of a path of `list_names` or `candidates`, and offset and size of its content.

        Raises:
            DataError: `ambiguous: ...`, the tar has several members of that name.
        """
        found = self._index.where(path)
        if len(found) > 1:
            raise DataError(
                f"ambiguous: {printable(self.where)} has {len(found)} members of the name "
                f"{printable(path)}; make the tar again with different names"
            )
        number, offset, size = found[0]
        return self._tars[number], offset, size
