"""`python -m vlal_dist.supervise -- COMMAND`: run a job, wait for all of it, start it again.

The `deepspeed` command forwards no signal, and is gone while its ranks still save; a container or
scheduler that waits for it tears them down. This program waits for every process that came of the
command. It imports no torch and works for any launcher; Linux only.
"""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from vlal_dist.config.load import help_text, parse_command_line
from vlal_dist.errors import ConfigError, DataError, Stopped, StorageError, UsageError, VlalError
from vlal_dist.observability.logs import setup_logging
from vlal_dist.processes import Process, descendants, has_variable
from vlal_dist.program import EXIT_FILE

logger = logging.getLogger("vlal_dist.supervise")

USAGE = "python -m vlal_dist.supervise"
PURPOSE = """
Run the command that follows `--`, such as a training under deepspeed or torchrun. Asked to stop
(SIGTERM, SIGINT, SIGUSR1, SIGHUP) it sends SIGTERM to the ranks, which save together and leave; the
exit code is then 75. A command that fails for a reason that may pass (killed, out of reach, a peer
lost) is started again, and resumes from its last whole checkpoint; done, a wrong setting, bad data
or a stop end it. It ends when no process that came of the command is left.
"""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FINAL = {0, UsageError.exit_code, ConfigError.exit_code, DataError.exit_code, Stopped.exit_code}
"""Exit codes that another start would not change, or that ask for none."""
BACKOFF_LIMIT_S = 60.0
POLL_S = 0.1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Job:
    """A command and what came of it, one start after another; only one such object at a time.

    Args:
        grace_s: how long its processes may take to end (seconds).
        exit_file: where a program of ours leaves its exit code, which launchers change.

    Attributes:
        asked: the first signal that asked this process to stop.
    """

    def __init__(self, *, grace_s: float, exit_file: Path) -> None:
        self.asked: signal.Signals | None = None
        self._grace_s, self._exit_file = grace_s, exit_file
        # Orphans become our children: nothing that came of the command is lost from sight.
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        for number in SIGNALS:
            under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            if not (number is signal.SIGHUP and under_nohup):
                signal.signal(number, self._receive)

    def run(self, command: Sequence[str]) -> int:
        """Start the command and wait until nothing of it is left.

        Returns:
            The exit code of rank 0's program, else the command's (-N: killed by signal N).

        Raises:
            UsageError: there is no such program.
        """
        try:
            # A session of its own: Ctrl-C reaches us alone, and we tell the ranks.
            child = subprocess.Popen(
                command,
                env={**os.environ, EXIT_FILE: str(self._exit_file)},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            raise UsageError(f"{command[0]}: {error.strerror}; give a program after --") from None
        code: int | None = None
        deadline: float | None = None
        told: set[Process] = set()
        while True:
            for pid, status in _ended():
                if pid == child.pid:
                    code = child.returncode = os.waitstatus_to_exitcode(status)
            if code is not None or self.asked is not None:
                left = descendants(os.getpid())
                if code is not None and not left:
                    return self._told(code)
                deadline = deadline or time.monotonic() + self._grace_s
                if self.asked is not None:
                    _tell(left, told)
                if time.monotonic() > deadline:
                    _kill(left)
                    deadline += self._grace_s
            time.sleep(POLL_S)

    def _told(self, code: int) -> int:
        if code == -signal.SIGKILL:  # nobody asked: its ranks noticed, saved and left
            return code
        try:
            text = self._exit_file.read_text(encoding="ascii")
            self._exit_file.unlink()
            return int(text)
        except (OSError, ValueError):
            return code

    def wait(self, seconds: float) -> None:
        """Sleep, less if asked to stop."""
        until = time.monotonic() + seconds
        while self.asked is None and time.monotonic() < until:
            time.sleep(POLL_S)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number)


def supervise(
    command: Sequence[str], *, restarts: int, backoff_s: float, healthy_s: float, grace_s: float
) -> int:
    """Run a command until it ends for good; returns the exit code (config/sections.py)."""
    with tempfile.TemporaryDirectory(prefix="vlal-supervise-") as folder:
        job = Job(grace_s=grace_s, exit_file=Path(folder, "code"))
        return _again_and_again(
            job, list(command), restarts=restarts, backoff_s=backoff_s, healthy_s=healthy_s
        )


def _again_and_again(
    job: Job, command: list[str], *, restarts: int, backoff_s: float, healthy_s: float
) -> int:
    failures = 0
    while True:
        started = time.monotonic()
        code = job.run(command)
        lasted = time.monotonic() - started
        if job.asked is not None:
            logger.info("asked to stop by %s; the command ended with %d", job.asked.name, code)
            return code if code in FINAL | {StorageError.exit_code} else Stopped.exit_code
        if code in FINAL:
            return code
        if -code in (signal.SIGTERM, signal.SIGINT):  # the launcher itself was asked
            return Stopped.exit_code
        failures = 1 if lasted >= healthy_s else failures + 1
        if failures > restarts:
            logger.error("the command ended with %d, failure %d in a row", code, failures)
            return code if code > 0 else 128 - code
        pause_s = min(backoff_s * 2 ** (failures - 1), BACKOFF_LIMIT_S)
        logger.warning(
            "the command ended with %d after %.1f s; start %d of %d again in %.1f s",
            code,
            lasted,
            failures,
            restarts,
            pause_s,
        )
        job.wait(pause_s)
        if job.asked is not None:
            return Stopped.exit_code
        command = resuming(command)


def resuming(command: Sequence[str]) -> list[str]:
    """The command as a restart needs it: it must not begin anew, or go back to where it began."""
    words = list(command)
    for place, word in enumerate(words):
        if word == "--resume" and place + 1 < len(words):
            words[place + 1] = "auto"
        elif word.startswith("--resume="):
            words[place] = "--resume=auto"
    return words


def _tell(left: Sequence[Process], told: set[Process]) -> None:
    """Send SIGTERM, once to each, to the ranks; where there are none, to the command.

    Past the launchers, because DeepSpeed's ends its ranks one after another.
    """
    ranks = {one.pid: one for one in left if has_variable(one.pid, "RANK")}
    topmost = [one for one in ranks.values() if one.parent not in ranks]
    for process in topmost or left[:1]:
        if process not in told:
            told.add(process)
            _send(process, signal.SIGTERM)


def _kill(left: Sequence[Process]) -> None:
    logger.error("killing %d processes that did not end in time", len(left))
    for process in left:
        _send(process, signal.SIGKILL)


def _send(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def _ended() -> list[tuple[int, int]]:
    """Ids and statuses of our children that have ended since the last call, adopted ones too."""
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, status))


def _die_with_parent() -> None:
    """In the child, before the program: if this process is killed, it is to stop too."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed; the supervisor needs Linux")


def main() -> int:
    """Run on the command line's arguments."""
    words = sys.argv[1:]
    own, command = words, []
    if "--" in words:
        own, command = words[: words.index("--")], words[words.index("--") + 1 :]
    if "--help" in own or "-h" in own:
        text = help_text(usage=USAGE, purpose=PURPOSE, sections=("supervise",), flags=())
        sys.stdout.write(text + "\n")
        return 0
    setup_logging()
    try:
        line = parse_command_line(own, flags=(), sections=("supervise",), needs_config=False)
        if not command:
            raise UsageError(
                "no command; write it after --, such as: -- deepspeed vlal_dist/train.py"
            )
        return supervise(command, **line.config.supervise.model_dump())
    except VlalError as error:
        sys.stderr.write(f"supervise: error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
