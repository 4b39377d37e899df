"""Other processes of this machine, and stop signals to this one."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event
from typing import Any

import psutil
from psutil import Process

_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def is_alive(process: Process) -> bool:
    """Whether a process runs or is stopped; a zombie has ended."""
    try:
        return process.is_running() and process.status() not in _ENDED
    except psutil.Error:
        return False


def descendants(root: Process) -> list[Process]:
    """Children of a process that are alive, their children, and so on; parents come first."""
    return [one for one in root.children(recursive=True) if is_alive(one)]


def variables(process: Process) -> dict[str, str]:
    """The environment that a process was started with; empty if it cannot be read."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


@contextmanager
def handled(signals: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Context with another handler of some signals, for the main thread alone."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            # None: set by C code, which Python cannot put back
            signal.signal(number, signal.SIG_DFL if old is None else old)


def set_on_stop_signal(stop: Event) -> AbstractContextManager[None]:
    """Context in which SIGTERM and SIGINT only set `stop`."""
    return handled((signal.SIGTERM, signal.SIGINT), lambda *_: stop.set())
