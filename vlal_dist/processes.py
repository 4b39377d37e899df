"""Other processes of this machine, and stop signals to this one."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Event
from typing import Any

import psutil
from psutil import Process

from vlal_dist.errors import ConfigError, VlalError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def launcher_number(name: str, default: int) -> int:
    """The number in a variable that launchers of ranks set, such as WORLD_SIZE.

    Args:
        name: of the variable.
        default: the number where it is absent or empty.

    Raises:
        ConfigError: it holds something else than a number from 0.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"the environment variable {name} is {text!r}, but must be a number from 0: it is set "
            f"by the launcher of the ranks; unset {name}, or start with vlal train --ranks N, "
            "deepspeed or torchrun"
        )
    return int(text)


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


def run_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    grace_s: float,
    inherited: Sequence[int] = (),
) -> int:
    """Run a command to its end; if this process is interrupted, end it with all its children.

    Args:
        command: program and arguments.
        environment: of the command; None: this process's.
        grace_s: seconds that it has to save and leave after SIGTERM, before it is killed.
        inherited: file descriptors that it keeps open, such as a lock.

    Returns:
        Its exit code, 128 + N where signal N ended it.

    Raises:
        VlalError: it cannot be started.
        KeyboardInterrupt: this process was interrupted; the command has ended.
    """
    try:
        # A session of its own: the whole group can be signalled, as launchers do not always end
        # their ranks; and it does not outlive a killed parent.
        process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,
            pass_fds=inherited,
        )
    except OSError as error:
        raise VlalError(f"{command[0]} cannot be started: {error.strerror}") from None
    try:
        code = process.wait()
    except KeyboardInterrupt:
        _end_group(process, grace_s)
        raise
    return code if code >= 0 else 128 - code


def _end_group(process: "subprocess.Popen[bytes]", grace_s: float) -> None:
    """Ask a command and its children to leave; after `grace_s` seconds, kill them."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(grace_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # asked twice: at once
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()


def die_with_parent() -> None:
    """In a child, before its program starts: get SIGTERM when the parent is killed (Linux)."""
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def prctl(option: int, value: int) -> None:
    """The system call of that name, with one argument; OSError where there is none."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed; this needs Linux")
