"""Tar shards: the exact bytes of a sample, reading one back, verified; members of foreign tars.

A sample is a run of adjacent tar members, `KEY.jpg`, `KEY.json` and after merge
`KEY.likelihood.npy`. Headers are USTAR with every field fixed, so the same sample is the same bytes
on any machine; a test compares them with webdataset's own `TarWriter`. Python's `tarfile` ends
quietly on a damaged header, so samples are found by the index and verified by their crc32.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vlal_dist.data.hashing import uid_to_hex
from vlal_dist.errors import DataError, bounded

BLOCK = tarfile.BLOCKSIZE
KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
MEMBERS = ("jpg", "json", "likelihood.npy")


@dataclass(frozen=True)
class EncodedSample:
    """One sample as it lies in a tar.

    Attributes:
        key: as webdataset and `labels.parquet` have it.
        data: headers, contents and padding; a multiple of 512 bytes.
        members: member -> (offset in `data`, length) of its contents, bytes.
        crc32: zlib.crc32 of `data`.
    """

    key: str
    data: bytes
    members: dict[str, tuple[int, int]]
    crc32: int


def sample_key(instance_id: str, uid: int) -> str:
    """The instance id where webdataset and USTAR can hold it, else the hex of the uid."""
    return instance_id if KEY_PATTERN.fullmatch(instance_id) else uid_to_hex(uid)


def encode_sample(key: str, members: Mapping[str, bytes]) -> EncodedSample:
    """The tar bytes of one sample.

    Raises:
        DataError: a key that a tar or webdataset cannot hold, or an unknown member.
    """
    if not KEY_PATTERN.fullmatch(key):
        raise DataError(f"sample key {key!r} must match {KEY_PATTERN.pattern}; use its uid")
    pieces: list[bytes] = []
    where: dict[str, tuple[int, int]] = {}
    position = 0
    for name in sorted(members):
        if name not in MEMBERS:
            raise DataError(f"sample {key}: member {name!r} is not one of {', '.join(MEMBERS)}")
        content = members[name]
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size, info.mode, info.mtime = len(content), 0o444, 0
        header = info.tobuf(tarfile.USTAR_FORMAT)
        padding = bytes(-len(content) % BLOCK)
        pieces += [header, content, padding]
        where[name] = (position + len(header), len(content))
        position += len(header) + len(content) + len(padding)
    data = b"".join(pieces)
    return EncodedSample(key=key, data=data, members=where, crc32=zlib.crc32(data))


def tar_end(size: int) -> bytes:
    """The end of a tar whose samples take `size` bytes: two zero blocks, padded to a record."""
    closed = size + 2 * BLOCK
    return bytes(2 * BLOCK + -closed % tarfile.RECORDSIZE)


def key_of(data: bytes) -> str:
    """The key in the first header of a sample's tar range.

    Raises:
        DataError: the range does not begin with a member's name.
    """
    name = data[:100].split(b"\0", 1)[0]
    key, dot, _ = name.partition(b".")
    try:
        text = key.decode("ascii")
    except UnicodeDecodeError:
        text = ""
    if not dot or not KEY_PATTERN.fullmatch(text):
        raise DataError(f"a sample's first header names {name!r}, not KEY.MEMBER; verify the shard")
    return text


def list_members(data: bytes) -> list[tuple[str, int, int]]:
    """Name, content offset and size of every member, by plain `tarfile` (for `verify`).

    Raises:
        DataError: this is no tar.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return [(member.name, member.offset_data, member.size) for member in tar]
    except Exception as error:  # headers of others raise any type, zlib's and struct's too
        raise DataError(f"no tar can be read ({bounded(str(error))}); pack again") from None


ReadRange = Callable[[int, int], bytes]
"""`length` bytes of a file from `offset` on; fewer only where the file ends."""

LONGEST_HEADER = 1 << 20
"""Bytes of one extended header that is read (PAX, GNU long names)."""


@dataclass(frozen=True, slots=True)
class ForeignMember:
    """A member of a tar that others wrote.

    Attributes:
        name: as stored, bytes that are no UTF-8 escaped as `os.fsdecode` does.
        offset: of its content in the tar, bytes.
        size: of its content, bytes.
        kind: empty for a regular file, whose content lies there as it is; else what it is.
    """

    name: str
    offset: int
    size: int
    kind: str = ""


def is_tar(head: bytes) -> bool:
    """Whether a file's first 512 bytes are a tar header with its checksum."""
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def walk_tar(read: ReadRange, size_bytes: int) -> Iterator[ForeignMember]:
    """The members of a foreign tar in order, from its headers alone; nothing is extracted.

    USTAR, PAX and GNU headers are understood. The tar ends with a block of zeros or with the file.
    Unlike Python's `tarfile`, which takes a damaged header for the end, this says where it is; the
    members before it were given already.

    Args:
        read: ranged read of the tar.
        size_bytes: of the tar.

    Raises:
        DataError: a damaged header, or a member that goes beyond the end of the file.
    """
    position, last, extended = 0, "", dict[str, str]()
    while position < size_bytes:
        block = read(position, BLOCK)
        if not block.strip(b"\0"):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise _damaged(position, last, str(error)) from None
        start, size = position + BLOCK, info.size
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if not 0 <= size <= min(LONGEST_HEADER, size_bytes - start):
                raise _damaged(position, last, f"an extended header of {size} bytes")
            try:
                extended |= _extended(info.type, read(start, size))
            except ValueError as error:
                raise _damaged(position, last, f"an extended header: {error}") from None
            position = start + size + -size % BLOCK
            continue
        name, kind = extended.get("path", info.name), _KINDS.get(info.type, "special file")
        if kind == "sparse":  # its map goes on in further blocks
            more = block[482]
            while more and start < size_bytes:
                more = read(start, BLOCK).ljust(BLOCK, b"\0")[504]
                start += BLOCK
        elif any(key.startswith("GNU.sparse.") for key in extended):
            kind = "sparse"
        try:
            size = int(extended.get("size", size))
        except ValueError:
            raise _damaged(position, last, "a size that is no number") from None
        has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        size = size if has_content or info.type in _HEADERS else 0
        if not 0 <= size <= size_bytes - start:
            raise _damaged(position, last, f"{bounded(repr(name))} has {size} bytes, "
                           f"the file {size_bytes - start} more")  # fmt: skip
        position = start + size + -size % BLOCK
        if info.type not in _HEADERS:
            yield ForeignMember(name, start, size, kind)
            last, extended = name, {}


_HEADERS = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
"""Headers that say nothing about a member's name, place and size."""
_KINDS = {
    tarfile.REGTYPE: "",
    tarfile.AREGTYPE: "",
    tarfile.CONTTYPE: "",
    tarfile.DIRTYPE: "folder",
    tarfile.LNKTYPE: "link",
    tarfile.SYMTYPE: "link",
    tarfile.GNUTYPE_SPARSE: "sparse",
}


def _damaged(position: int, last: str, why: str) -> DataError:
    behind = f", behind the member {bounded(repr(last))}" if last else ""
    return DataError(f"damaged at byte {position}{behind}: {why}; make the tar again")


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """Records of an extended header: GNU's long name, or PAX's `LENGTH KEY=VALUE\\n`.

    Raises:
        ValueError: malformed.
    """
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.index(b" ", at, at + 20)
        end = at + int(data[at:space])
        if not space < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError("a record of a wrong length")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise ValueError("a record without a value")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = end
    return found
