"""Interface to local folders and S3 buckets: ranged read, create-only commit, list.

No retry is endless and no data is edited in place.
"""

import fcntl
import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from vlal_dist.errors import ConfigError, DataError, NotFoundError, extras_named
from vlal_dist.storage.checks import masked, translated_errors
from vlal_dist.storage.local import LocalStore, replacing

FETCH_BYTES = 64 << 20
"""Bytes of one ranged read of `fetch`; also its peak memory."""


class Store(Protocol):
    """Objects under one root. Keys are relative and `/`-separated; a bad key is a DataError.

    Safe to use from many threads and to pickle; a forked child makes its own connections.
    """

    url: str

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset` on (None: all that follow).

        A remote request outlasts an outage of the store of about a minute, then gives up. Stored
        data is never edited in place, so an object must stay the one that this process first read
        a range of; what is read whole (a status file) may change from one read to the next.

        Raises:
            NotFoundError: no such object.
            TruncatedError: the object ends before the range does.
            ReplacedError: the object was replaced during the read, or since an earlier range of it.
            StorageError: it cannot be read: refused, or out of reach for too long.
        """
        ...

    def size(self, key: str) -> int:
        """Return the size in bytes; NotFoundError, StorageError."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether the object is there; StorageError if that cannot be known."""
        ...

    def create(self, key: str, data: bytes | Path) -> bool:
        """Commit bytes or a file's content under a name that must be new; all or nothing.

        Of racing writers at most one gets True. After an answer lost on the network the writer's
        own object may be what it finds: then it gets False.

        Returns:
            True if the object was created, False if one with the same bytes was there.

        Raises:
            ConflictError: other bytes are there; they stay.
            StorageError: nothing could be written.
        """
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Overwrite atomically. For status files only, never for data; StorageError."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object if it is there; StorageError."""
        ...

    def list_keys(self, prefix: str = "") -> list[str]:
        """Return all keys that begin with `prefix`, sorted, without unfinished files."""
        ...

    def sweep(self, folder: str) -> None:
        """Remove what killed writers left unfinished below a folder, and empty ones; StorageError.

        Only where this process alone writes.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Return the path of a local root's file, for memory maps; None when remote."""
        ...


def open_store(url: str) -> Store:
    """Open a root: a plain path, `file:///path` or `s3://bucket/prefix`. Reads nothing yet.

    Credentials, region and endpoint of S3 come from the AWS variables and profiles alone.

    Raises:
        ConfigError: another scheme, no bucket, an empty or unclean path, or boto3 is not installed.
    """
    if re.match(r"s3:", url, re.IGNORECASE):
        # Local users need not wait for boto3, which takes a third of a second to import.
        with extras_named():
            from vlal_dist.storage.s3 import S3Store

        return S3Store(url)
    if re.match(r"file:", url, re.IGNORECASE):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ConfigError(f"root {masked(url)!r}: a file URL is written file:///absolute/path")
        return LocalStore(Path(unquote(parts.path)))
    if not url or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url):
        raise ConfigError(
            f"root {masked(url)!r}: give a path, file:///path or s3://bucket/prefix; other schemes "
            "are not supported (a path whose first part holds a colon is written ./a:b)"
        )
    return LocalStore(Path(url).expanduser())


def read_url(url: str) -> bytes:
    """The content of a single file: a path, or a URL as `open_store` takes it.

    Raises:
        ConfigError, NotFoundError, StorageError: as `open_store` and `Store.read`.
    """
    root, slash, name = url.rpartition("/")
    return open_store(root or (slash or ".")).read(name)


def find_files(pattern: str) -> list[tuple[Store, str]]:
    """The files that a path, URL or glob pattern (`*`, `?`, `[a-z]`) names, sorted: store and key.

    A file whose own name holds such characters comes first. `*` stays within a folder; names that
    begin with a dot are met by patterns that do. An object without a pattern is not looked up.

    Raises:
        ConfigError: as `open_store`.
        StorageError: a bucket cannot be listed.
    """
    folder, slash, name = pattern.rpartition("/")
    found = _GLOB.search(pattern)
    if found is None or Path(pattern).is_file():
        return [(open_store(folder or (slash or ".")), name)]
    fixed = pattern[: found.start()].rpartition("/")[0]
    store = open_store(fixed or ("/" if pattern.startswith("/") else "."))
    wanted = pattern[len(fixed) :].lstrip("/")
    local = store.local_path("any")
    if local is None:
        keys = store.list_keys(_GLOB.split(wanted)[0])
        keys = [key for key in keys if _meets(key, wanted.split("/"))]
    else:
        keys = [k for k in glob.glob(wanted, root_dir=local.parent) if (local.parent / k).is_file()]
    return [(store, key) for key in sorted(keys)]


_GLOB = re.compile(r"[*?[]")


def _meets(key: str, wanted: Sequence[str]) -> bool:
    """Whether each part of a key meets the pattern of that part."""
    parts = key.split("/")
    return len(parts) == len(wanted) and all(
        fnmatch.fnmatchcase(part, one) and (one.startswith(".") or not part.startswith("."))
        for part, one in zip(parts, wanted, strict=True)
    )


def fetch(store: Store, key: str, *, cache: Path, sha256: str) -> Path:
    """Return a local file with the object's bytes, downloading a remote one once.

    Args:
        store: where the object is.
        key: its key.
        cache: local folder for downloads, named by digest; may be shared by processes.
        sha256: expected digest, 64 lower-case hex digits; checked on download only.

    Raises:
        NotFoundError: no such object.
        DataError: the digest is not one, the downloaded bytes have another, or the object was
            replaced or cut on the way.
        StorageError: network or disk.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DataError(
            f"{store.url}: digest of {key!r} is {sha256!r}, not 64 hex digits of sha256"
        )
    local = store.local_path(key)
    if local is not None:
        if not local.is_file():
            raise NotFoundError(f"{local}: no such file; check the root and the key")
        return local
    target = cache / sha256
    if target.is_file():
        return target
    with translated_errors(target), ExitStack() as stack:
        cache.mkdir(parents=True, exist_ok=True)
        # One process of the node downloads, the others wait; the lock ends with its process.
        folder = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        fcntl.flock(folder, fcntl.LOCK_EX)
        if target.is_file():
            return target
        with replacing(target) as temporary:
            got = _download(store, key, temporary)
            if got != sha256:  # altered on the way, or for good
                got = _download(store, key, temporary)
            if got != sha256:
                raise DataError(
                    f"{store.url}: {key!r} has sha256 {got}, expected {sha256}; the object was "
                    "damaged or replaced: run `verify` on the root, then restore it"
                )
    return target


def _download(store: Store, key: str, path: Path) -> str:
    """Write the object to a local file, piece by piece; returns its sha256."""
    digest = hashlib.sha256()
    size_bytes = store.size(key)
    with path.open("wb") as file:
        for offset in range(0, size_bytes, FETCH_BYTES):
            length = min(FETCH_BYTES, size_bytes - offset)
            piece = store.read(key, offset=offset, length=length)
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
