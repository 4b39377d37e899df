"""Tar shards: the exact bytes of a sample, and reading one sample back, verified.

A sample is a run of adjacent tar members, `KEY.jpg`, `KEY.json` and after merge
`KEY.likelihood.npy`. Headers are USTAR with every field fixed, so the same sample is the same bytes
on any machine; a test compares them with webdataset's own `TarWriter`. Python's `tarfile` ends
quietly on a damaged header, so samples are found by the index and verified by their crc32.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Mapping
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
