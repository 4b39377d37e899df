"""One writer at a time: a lock of the kernel on local roots, a renewed lease on S3.

A program locks what it writes for as long as it works (`program.run_program`). A second writer
waits a few seconds for one that is just ending, and is then refused before it writes anything.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlal_dist.errors import StorageError
from vlal_dist.storage.checks import TEMPORARY_PREFIX, translated_errors
from vlal_dist.storage.local import make_folder
from vlal_dist.storage.store import open_store

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long a second writer waits for the first to end: a restart, a requeued job, a replaced pod
begin while the process before them is still leaving."""
LEFT_BEHIND_S = 60.0
"""How long it waits for the children of a killed writer, which keep its lock until they end."""
POLL_S = 0.1
_CONTENT_BYTES = 4096
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}

Holder = dict[str, Any]
"""Who holds a lock, as its file or object says: program, host, pid, since, boot, started."""

_descriptors: list[int] = []


@contextmanager
def writer_lock(root: str, name: str = "", *, program: str) -> Iterator[None]:
    """Context in which no other program writes a root, or what `name` stands for in it.

    On a local root the lock dies with its holder and its children. On S3 the lease of a killed
    holder is taken over after `s3_lease.EXPIRED_S`.

    Args:
        root: folder or URL; a local one is made, and removed at the end if nothing was written.
        name: results that have a place of their own in the root; empty: the root as a whole.
        program: short name, for the message to a second writer.

    Raises:
        StorageError: another process writes there; the message says which, and since when.
        ConfigError: an S3 store that ignores conditions of requests, so that nothing is safe in it.
    """
    suffix = f"-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
    key = f"{TEMPORARY_PREFIX}lock{suffix if name else ''}"
    store, holder = open_store(root), _this_process(program)
    if store.local_path("file") is None:
        from vlal_dist.storage.s3_lease import lease  # botocore is slow to import

        with lease(store.url, key, holder, gone=has_ended, refused=refused, grace_s=GRACE_S):
            yield
        return
    folder = Path(store.url)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with translated_errors(folder / key):
        descriptor = _locked(folder / key, holder, store.url)
    _descriptors.append(descriptor)
    try:
        yield
    finally:
        _descriptors.remove(descriptor)
        # Removed while locked; a process that has it open notices that the name is another file's.
        with suppress(OSError):
            os.unlink(folder / key)
        os.close(descriptor)
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


def descriptors() -> tuple[int, ...]:
    """The local locks that this process holds, for children that may outlive it."""
    return tuple(_descriptors)


def refused(url: str, holder: Mapping[str, Any], *, left: str = "") -> StorageError:
    """The error for a second writer.

    Args:
        url: the root.
        holder: who writes there.
        left: the processes that a killed holder left behind, if it is their lock.
    """
    pid, host = holder.get("pid", "unknown"), holder.get("host", "unknown")
    who = f"{holder.get('program', 'another program')} (process {pid} on {host})"
    since = holder.get("since", "an unknown time")
    if left:
        return StorageError(
            f"{url}: {who} was killed, but processes that it started still write here: {left}; "
            "wait for them or end them with kill, then repeat the command. Nothing was written"
        )
    return StorageError(
        f"{url}: {who} has been writing here since {since}, and a root has one writer at a time; "
        f"wait until it ends, or stop it (kill {pid} on {host}), then repeat the command; or give "
        "another root. Nothing was written"
    )


def has_ended(holder: Mapping[str, Any]) -> bool:
    """Whether a holder was a process of this machine, and is known to have ended."""
    boot, pid = holder.get("boot"), holder.get("pid")
    if not boot or boot != _boot() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's, of which /proc may show nothing
        return False
    return _started(pid) != holder.get("started")


def _this_process(program: str) -> Holder:
    return {
        "program": program,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "boot": _boot(),
        "started": _started(os.getpid()),
    }


def _boot() -> str:
    """This start of this machine and the namespace of its process ids; empty if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in ticks since boot; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _locked(path: Path, holder: Holder, url: str) -> int:
    """A descriptor that holds the lock of a file."""
    began, waiting = time.monotonic(), False
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read(descriptor)
            os.close(descriptor)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logger.warning(
                "%s: this file system has no locks (%s): nothing keeps a second program from "
                "writing here at the same time; mount it with locks",
                url,
                error.strerror,
            )
            return descriptor
        else:
            if _still_named(path, descriptor) and _write(path, descriptor, holder):
                return descriptor
            os.close(descriptor)
            continue
        orphans = has_ended(other)
        if not waiting:
            waiting = True
            logger.info("%s: waiting for %s to end", url, other.get("program", "another program"))
        if time.monotonic() - began > (LEFT_BEHIND_S if orphans else GRACE_S):
            raise refused(url, other, left=_users(path) if orphans else "")
        time.sleep(POLL_S)


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    make_folder(path.parent)
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # the writer before has just removed the empty folder
        return _open(path)
    except PermissionError:  # another user's, whom a kill kept from removing it
        if not os.access(path.parent, os.W_OK):
            raise
        return os.open(path, flags | os.O_RDONLY)


def _still_named(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name: the holder before may have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    return False


def _write(path: Path, descriptor: int, holder: Holder) -> bool:
    """Say who holds the lock; False if the file was another user's and is removed."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        os.unlink(path)
        return False
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
    return True


def _read(descriptor: int) -> Holder:
    """Who holds the lock; empty in the moment before that is written."""
    try:
        found = json.loads(os.pread(descriptor, _CONTENT_BYTES, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _users(path: Path) -> str:
    """Ids of the processes of this user that have a file open."""
    found, real = [], os.path.realpath(path)
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(link) == real for link in (folder / "fd").iterdir()):
                found.append(folder.name)
    return ", ".join(found) or "not to be found"
