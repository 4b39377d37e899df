"""Other processes of this machine, and stop signals to this one.

Processes are read from /proc; elsewhere than on Linux none is found.

A process is identified by its id and start time, so that a new process under an old id is not taken
for it. A zombie (ended, but its parent has not waited for it) counts as ended.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import NamedTuple

PROC = Path("/proc")


class Process(NamedTuple):
    """One process.

    Attributes:
        pid: its id.
        parent: id of its parent when it was looked up.
        started: its start time, in the kernel's ticks.
    """

    pid: int
    parent: int
    started: int

    def is_alive(self) -> bool:
        """Whether it still runs (or is stopped)."""
        now = look_at(self.pid)
        return now is not None and now.started == self.started


def look_at(pid: int) -> Process | None:
    """The process with this id; None: there is none, it has ended, or it cannot be seen."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        # The name, in brackets, may hold anything.
        values = text.rpartition(")")[2].split()
        state, parent, started = values[0], int(values[1]), int(values[19])
    except (OSError, ValueError, IndexError):
        return None
    return None if state in "ZX" else Process(pid, parent, started)


def descendants(root: int) -> list[Process]:
    """Children of a process, their children, and so on; parents come first."""
    try:
        ids = [int(name) for name in os.listdir(PROC) if name.isdecimal()]
    except OSError:
        return []
    children: dict[int, list[Process]] = {}
    for process in filter(None, map(look_at, ids)):
        children.setdefault(process.parent, []).append(process)
    found = list(children.get(root, []))
    for process in found:  # grows while it is read
        found.extend(children.get(process.pid, []))
    return found


def command_line(pid: int) -> list[str]:
    """The words of its command; none if they cannot be read."""
    return _strings(pid, "cmdline")


def has_variable(pid: int, name: str) -> bool:
    """Whether it was started with an environment variable; False if that cannot be known."""
    return any(entry.startswith(f"{name}=") for entry in _strings(pid, "environ"))


def _strings(pid: int, file: str) -> list[str]:
    try:
        data = (PROC / str(pid) / file).read_bytes()
    except OSError:
        return []
    return [part.decode(errors="replace") for part in data.split(b"\0") if part]


@contextmanager
def set_on_stop_signal(stop: Event) -> Iterator[None]:
    """Context in which SIGTERM and SIGINT only set `stop`; the old handlers return at its end."""

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: set by C code, which Python cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
