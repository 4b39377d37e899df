"""Disk cache for blocks of remote shards: size-limited over all ranks of a node, crash-safe.

    FOLDER/blocks/<sha256[:32]>-<offset>-<length>.block   an entry; its mtime is its last use
    FOLDER/writing/<pid>-<random>-<length>.part           an entry being written
    FOLDER/.vlal-block-cache-used                         bytes of all of these, or a little more

A writer first adds its length to the last file, under that file's lock, and evicts if the sum is
above the limit. So a crash can only leave the number too high, and each eviction counts again. Only
regular files with such names in these two folders are ever removed. Contents are not verified here:
the reader knows their checksums and calls `discard`.
"""

import errno
import fcntl
import logging
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vlal_dist.errors import ConfigError, DataError, StorageError

logger = logging.getLogger(__name__)

LOCK_WAIT_S = 5.0
"""Longest wait for another process's eviction, in seconds; then the block is not kept."""
KEPT_PERCENT = 90
"""How full an eviction leaves the cache, in percent of its limit."""
_LEFTOVER_S = 3600.0
_ENTRY = re.compile(r"[0-9a-f]{32}-\d+-\d+\.block")
_PART = re.compile(r"(\d{1,9})-[0-9a-f]{32}-(\d+)\.part")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class CacheCounts:
    """Counts of one cache object, and bytes in the folder.

    Attributes:
        hits, misses: of `get`.
        evictions: entries removed to make room.
        failed_writes: blocks that could not be kept: disk error, or lock held for too long.
        bytes: bytes in the folder, of all processes, when last read; may be a little high.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failed_writes: int = 0
    bytes: int = 0


class DiskCache:
    """Least recently used cache of byte ranges of shards.

    May be shared by threads, and the folder by processes of one machine.

    Args:
        folder: made if absent; may hold anything else.
        limit_bytes: of all entries together, including those being written.
        largest_bytes: length of the largest block that will be put.

    Raises:
        ConfigError: the largest block does not fit into the limit.
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, largest_bytes: int) -> None:
        if limit_bytes < largest_bytes:
            raise ConfigError(
                f"data.cache_bytes is {limit_bytes}, but the largest block of the data has "
                f"{largest_bytes} bytes: set data.cache_bytes to {largest_bytes} or more, much "
                "more to be of use"
            )
        # Absolute, because the process may change its folder later.
        root = Path(os.path.abspath(folder))
        self._blocks = str(root / "blocks")
        self._writing = str(root / "writing")
        self._counter = str(root / ".vlal-block-cache-used")
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._counts = CacheCounts()
        self._warned = False
        try:
            os.makedirs(self._blocks, exist_ok=True)
            os.makedirs(self._writing, exist_ok=True)
        except OSError as error:
            message = f"cache {root}: {error.strerror}: choose a folder on a local disk for it"
            raise StorageError(message) from error
        try:
            with self._locked() as counter:
                self._store(counter, self._make_room(self._limit_bytes))
        except OSError as error:
            self._failed(error)

    @property
    def counts(self) -> CacheCounts:
        """Counts of this object so far."""
        with self._lock:
            return replace(self._counts)

    def get(self, shard_sha256: str, offset: int, length: int) -> bytes | None:
        """Return the block's bytes and mark it as just used; None if it is absent or truncated.

        Args:
            shard_sha256: digest of the shard, 64 lower-case hex digits.
            offset: first byte in the shard.
            length: bytes.
        """
        path = self._path(shard_sha256, offset, length)
        data = None
        with suppress(OSError):
            descriptor = os.open(path, _READ)
            try:
                # One byte more than expected tells a longer file.
                data = os.read(descriptor, length + 1)
                _mark_used(descriptor)
            finally:
                os.close(descriptor)
        if data is not None and len(data) != length:
            self.discard(shard_sha256, offset, length)
            data = None
        with self._lock:
            self._counts.hits += data is not None
            self._counts.misses += data is None
        return data

    def put(self, shard_sha256: str, offset: int, data: bytes) -> None:
        """Write a block; errors are counted, and the first one is logged."""
        path = self._path(shard_sha256, offset, len(data))
        if len(data) > self._limit_bytes or os.path.lexists(path):
            return
        part = os.path.join(self._writing, f"{os.getpid()}-{uuid.uuid4().hex}-{len(data)}.part")
        try:
            descriptor = self._reserve(part, len(data))
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    _mark_used(descriptor)
                os.rename(part, path)
            except OSError:
                self._remove(part, len(data))
                raise
        except OSError as error:
            self._failed(error)

    def discard(self, shard_sha256: str, offset: int, length: int) -> None:
        """Remove a block if it is there: its bytes are not those of the shard."""
        path = self._path(shard_sha256, offset, length)
        with suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                # An eviction counts its size, a writer its length: the smaller cannot be too much.
                self._remove(path, min(status.st_size, length))

    def _path(self, shard_sha256: str, offset: int, length: int) -> str:
        name = f"{shard_sha256[:32]}-{offset}-{length}.block"
        if not _ENTRY.fullmatch(name):
            raise DataError(
                f"cached block of shard {shard_sha256!r}, offset {offset}, length {length}: give "
                "the shard's sha256 as lower-case hex digits, and numbers of 0 or more"
            )
        return f"{self._blocks}/{name}"

    def _reserve(self, part: str, size_bytes: int) -> int:
        """Make room and an empty file whose name holds the room; returns its descriptor.

        The file is made under the lock, so that the next count includes it.
        """
        with self._locked() as counter:
            used_bytes = _load(counter)
            if used_bytes is None or used_bytes + size_bytes > self._limit_bytes:
                kept_bytes = self._limit_bytes * KEPT_PERCENT // 100
                used_bytes = self._make_room(min(kept_bytes, self._limit_bytes - size_bytes))
            fits = used_bytes + size_bytes <= self._limit_bytes
            self._store(counter, used_bytes + size_bytes if fits else used_bytes)
            if not fits:
                raise OSError(errno.EBUSY, "other writers hold all of the cache's room")
            return os.open(part, _NEW, 0o666)

    def _make_room(self, target_bytes: int) -> int:
        """Count what is there, evict down to a target; returns the bytes left. Under the lock."""
        # Unfinished files first: one that is finished in between is then counted twice, not never.
        used_bytes = 0
        for name, path, status in _files(self._writing, _PART):
            if time.time() - status.st_mtime < _LEFTOVER_S and _is_alive(int(name[1])):
                used_bytes += int(name[2])
            else:
                with suppress(FileNotFoundError):
                    os.unlink(path)
        found = _files(self._blocks, _ENTRY)
        entries = sorted((status.st_mtime_ns, path, status.st_size) for _, path, status in found)
        used_bytes += sum(size_bytes for _, _, size_bytes in entries)
        for _, path, size_bytes in entries:
            if used_bytes <= target_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
                with self._lock:
                    self._counts.evictions += 1
            used_bytes -= size_bytes
        return used_bytes

    def _remove(self, path: str, size_bytes: int) -> None:
        """Remove a file and subtract its size, or at least remove it."""
        with suppress(OSError):
            try:
                with self._locked() as counter:
                    os.unlink(path)
                    if (used_bytes := _load(counter)) is not None:
                        self._store(counter, max(0, used_bytes - size_bytes))
            except OSError:
                os.unlink(path)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock of all processes and threads; yields the counter's descriptor.

        Raises:
            OSError: the lock was held for too long, or the file cannot be made.
        """
        descriptor = os.open(self._counter, _LOCK, 0o666)
        try:
            deadline = time.monotonic() + LOCK_WAIT_S
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() >= deadline:
                    raise OSError(errno.ETIMEDOUT, "another process holds the cache's lock")
                time.sleep(0.001)
            try:
                yield descriptor
            finally:
                # Closing is not enough if a child was forked meanwhile: it shares the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _store(self, counter: int, used_bytes: int) -> None:
        # One write of fixed length: a kill leaves the old number or the new one.
        os.pwrite(counter, b"%020d\n" % used_bytes, 0)
        with self._lock:
            self._counts.bytes = used_bytes

    def _failed(self, error: OSError) -> None:
        with self._lock:
            self._counts.failed_writes += 1
        if not self._warned:
            self._warned = True
            logger.warning(
                "cache %s: a block was not written: %s; free space or lower data.cache_bytes. "
                "Further failures are only counted",
                os.path.dirname(self._counter),
                error.strerror or error,
            )


def _files(
    folder: str, pattern: re.Pattern[str]
) -> Iterator[tuple[re.Match[str], str, os.stat_result]]:
    """Name, path and status of the regular files (links are none) whose whole name fits."""
    with os.scandir(folder) as found:
        for entry in found:
            if name := pattern.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield name, entry.path, status


def _load(counter: int) -> int | None:
    """The counted bytes; None if the file is new or damaged."""
    found = re.fullmatch(rb"(\d{20})\n", os.pread(counter, 32, 0))
    return None if found is None else int(found[1])


def _mark_used(descriptor: int) -> None:
    # The kernel's own "now" is some milliseconds coarse.
    with suppress(OSError):
        os.utime(descriptor, ns=(time.time_ns(), time.time_ns()))


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine has this id."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True
