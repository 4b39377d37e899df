"""Checks of keys and ranges, digests, and error messages that both stores share."""

import errno
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlal_dist.errors import (
    ConflictError,
    DataError,
    NotFoundError,
    StorageError,
    TruncatedError,
    VlalError,
)

TEMPORARY_PREFIX = ".vlal-tmp-"
"""Beginning of the names of unfinished files, which listings hide."""

CHUNK_BYTES = 1 << 20
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s/@:'\"<>]*:(?!\d+[/?#])[^\s'\"<>]*)@")

ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
"""System errors that mean that there is no such file."""
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space or choose another root",
    errno.EDQUOT: "the quota is used up: free space or choose another root",
    errno.EACCES: "check the permissions of the folder",
    errno.EROFS: "the file system is read-only: choose another root",
    errno.EPERM: "not permitted; create-only names need a file system with hard links",
    errno.EOPNOTSUPP: "create-only names need a file system with hard links: choose another root",
}


@dataclass(frozen=True)
class Digests:
    """Size in bytes and digests of the bytes of one object."""

    size_bytes: int
    sha256: str
    md5: bytes


def masked(text: str) -> str:
    """A text with the user information of every URL in it, `user:password@`, written `***@`.

    A password may hold `@` and `/`, though a URL should have them encoded.
    """
    return _USER.sub("***@", text)


def check_key(key: str) -> str:
    """Return `key` unchanged if it is a clean relative name.

    Raises:
        DataError: the key is empty or absolute, or a part of it is empty, `.`, `..`, holds a NUL or
            is reserved for unfinished files.
    """
    for part in key.split("/"):
        if part in ("", ".", "..") or "\0" in part or part.startswith(TEMPORARY_PREFIX):
            raise DataError(
                f"key {key!r} is not a name below the root: parts are separated by one '/', none "
                f"is empty, '.', '..' or starts with {TEMPORARY_PREFIX!r}; give a relative key"
            )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` unchanged if it can begin a key; its last part may be empty or incomplete.

    Raises:
        DataError: as for `check_key`.
    """
    folder, _, _ = prefix.rpartition("/")
    if folder or prefix.startswith("/"):
        check_key(folder)
    return prefix


def check_range(key: str, offset: int, length: int | None) -> None:
    """Refuse negative offsets and lengths (bytes) with DataError."""
    if offset < 0 or (length is not None and length < 0):
        raise DataError(
            f"range of {key!r}: offset {offset}, length {length}; both must be 0 or more, "
            "or the length None for all that follows"
        )


def short_read(
    url: str, key: str, *, offset: int, length: int | None, size_bytes: int
) -> TruncatedError:
    """The error for an object of `size_bytes` that ends before the requested range (bytes)."""
    wanted = "the rest" if length is None else f"{length} bytes"
    return TruncatedError(
        f"{url}: {key!r} is too short: wanted {wanted} at offset {offset}, but it ends at byte "
        f"{size_bytes}; the file is truncated or its index belongs to another one: run `verify` on "
        "the root"
    )


def conflict(url: str, key: str, *, existing: str, given: str) -> ConflictError:
    """The error for a create-only name that holds other bytes (both digests sha256)."""
    return ConflictError(
        f"{url}: {key!r} already holds other bytes: sha256 {existing} is stored, {given} was to be "
        "written; nothing was changed. Give another root, or remove the old output"
    )


def remedy(error: OSError) -> str:
    """What to do about a system error; empty where that is not known."""
    if "AF_UNIX path" in str(error):
        return "the temporary folder has too long a name for a socket: set TMPDIR to /tmp"
    return _REMEDIES.get(error.errno or 0, "")


def chunks_of(data: bytes | Path) -> Iterator[bytes]:
    """Yield bytes, or the content of a file, in pieces that bound memory."""
    if isinstance(data, bytes):
        yield data
        return
    with data.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def digests_of(data: bytes | Path) -> Digests:
    """Size and digests in one pass; OSError if the file cannot be read."""
    sha256 = hashlib.sha256()
    md5 = hashlib.md5(usedforsecurity=False)
    size_bytes = 0
    for chunk in chunks_of(data):
        sha256.update(chunk)
        md5.update(chunk)
        size_bytes += len(chunk)
    return Digests(size_bytes, sha256.hexdigest(), md5.digest())


def sha256_of(data: bytes | Path) -> str:
    """sha256 as 64 lower-case hex digits; OSError if the file cannot be read."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into NotFoundError or StorageError that names `path`.

    Errors of ours pass unchanged. An error that names another file keeps that file's name.
    """
    try:
        yield
    except VlalError:
        raise
    except OSError as error:
        name = error.filename or path
        code = error.errno or 0
        if code in ABSENT:
            raise NotFoundError(f"{name}: no such file; check the root and the key") from error
        advice = remedy(error) or "check the file system"
        raise StorageError(f"{name}: {error.strerror or error}; {advice}") from error
