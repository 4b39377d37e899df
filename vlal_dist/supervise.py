"""`vlal supervise -- COMMAND`: run a job, wait for all its processes, restart it.

The `deepspeed` command forwards no signal, and exits while its ranks still save; a container or
scheduler that waits for it kills them. This program waits for every descendant of the command. It
imports no torch and works with any launcher; Linux only.
"""

import contextlib
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

import psutil
from psutil import Process

from vlal_dist.config.load import help_text, parse_command_line
from vlal_dist.config.sections import SuperviseConfig
from vlal_dist.errors import ConfigError, DataError, Stopped, StorageError, UsageError, VlalError
from vlal_dist.observability.logs import lasting_streams, setup_logging
from vlal_dist.processes import descendants, die_with_parent, prctl, variables
from vlal_dist.program import EXIT_FILE

logger = logging.getLogger("vlal_dist.supervise")

USAGE = "vlal supervise"
PURPOSE = """
Run the command that follows `--`, such as a training under deepspeed or torchrun. On SIGTERM,
SIGINT, SIGUSR1 or SIGHUP it sends SIGTERM to the ranks, which save together and leave; the exit
code is then 75. A command that fails for a temporary reason (killed, storage out of reach, a peer
lost) is started again and resumes from its last complete checkpoint; success, a wrong setting, bad
data or a stop end it. It exits when no process of the command is left.
"""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FINAL = {0, UsageError.exit_code, ConfigError.exit_code, DataError.exit_code, Stopped.exit_code}
"""Exit codes after which the command is not restarted."""
BACKOFF_LIMIT_S = 60.0
POLL_S = 0.1
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Supervisor:
    """Runs a command and its restarts; one object per process, because it handles the signals.

    Args:
        config: restarts, pauses, and how long processes may take to end.
        exit_file: where a program of this project writes its exit code, which launchers change.
    """

    def __init__(self, config: SuperviseConfig, *, exit_file: Path) -> None:
        self._config, self._exit_file = config, exit_file
        self._stopped_by: signal.Signals | None = None
        # Orphans become our children, so that every descendant of the command is found.
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in SIGNALS:
            if not (number is signal.SIGHUP and under_nohup):
                signal.signal(number, self._receive)

    def run(self, command: Sequence[str]) -> int:
        """Run a command until it ends for good; returns the exit code.

        Raises:
            UsageError: there is no such program.
        """
        failures = 0
        while True:
            started = time.monotonic()
            code = self._run_once(command)
            lasted = time.monotonic() - started
            if self._stopped_by is not None:
                logger.info("stopped by %s; the command ended with %d", self._stopped_by.name, code)
                return code if code in FINAL | {StorageError.exit_code} else Stopped.exit_code
            if code in FINAL:
                return code
            if -code in (signal.SIGTERM, signal.SIGINT):  # somebody stopped the launcher itself
                return Stopped.exit_code
            failures = 1 if lasted >= self._config.healthy_s else failures + 1
            if failures > self._config.restarts:
                logger.error("the command ended with %d, failure %d in a row", code, failures)
                return code if code > 0 else 128 - code
            pause_s = min(self._config.backoff_s * 2 ** (failures - 1), BACKOFF_LIMIT_S)
            logger.warning(
                "the command ended with %d after %.1f s; restart %d of %d in %.1f s",
                code,
                lasted,
                failures,
                self._config.restarts,
                pause_s,
            )
            deadline = time.monotonic() + pause_s
            while self._stopped_by is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if self._stopped_by is not None:
                return Stopped.exit_code
            command = resuming(command)

    def _run_once(self, command: Sequence[str]) -> int:
        """Start the command and wait until no process of it is left.

        Returns:
            The exit code of rank 0's program, else the command's (-N: killed by signal N).
        """
        try:
            # A session of its own: Ctrl-C reaches us alone, and we signal the ranks.
            child = subprocess.Popen(
                command,
                env={**os.environ, EXIT_FILE: str(self._exit_file)},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise UsageError(f"{command[0]}: {error.strerror}; give a program after --") from None
        code: int | None = None
        deadline: float | None = None
        signalled: set[Process] = set()
        while True:
            for pid, status in _ended_children():
                if pid == child.pid:
                    code = child.returncode = os.waitstatus_to_exitcode(status)
            if code is not None or self._stopped_by is not None:
                left = descendants(Process())
                if code is not None and not left:
                    return self._exit_code(code)
                deadline = deadline or time.monotonic() + self._config.grace_s
                if self._stopped_by is not None:
                    _terminate_ranks(left, signalled)
                if time.monotonic() > deadline:
                    logger.error("killing %d processes that did not end in time", len(left))
                    for process in left:
                        _send(process, signal.SIGKILL)
                    deadline += self._config.grace_s
            time.sleep(POLL_S)

    def _exit_code(self, code: int) -> int:
        """The program's own exit code where it left one, else that of the launcher."""
        if code == -signal.SIGKILL:  # its ranks noticed, saved and left with 75; restart them
            return code
        try:
            text = self._exit_file.read_text(encoding="ascii")
            self._exit_file.unlink()
            return int(text)
        except (OSError, ValueError):
            return code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._stopped_by = self._stopped_by or signal.Signals(number)


def resuming(command: Sequence[str]) -> list[str]:
    """The command of a restart: `--resume none` or a path would discard what was trained since."""
    words = list(command)
    for place, word in enumerate(words):
        if word == "--resume" and place + 1 < len(words):
            words[place + 1] = "auto"
        elif word.startswith("--resume="):
            words[place] = "--resume=auto"
    return words


def _terminate_ranks(left: Sequence[Process], signalled: set[Process]) -> None:
    """Send SIGTERM, once each, to the ranks; to the command where there are none.

    Not to launchers: DeepSpeed's ends its ranks one after another, and torchrun's, when the ranks
    have left, prints a traceback.
    """
    ranks = [one for one in left if "RANK" in variables(one)]
    topmost = [one for one in ranks if not set(one.parents()) & set(ranks)]
    for process in topmost or ([] if signalled else left[:1]):
        if process not in signalled:
            signalled.add(process)
            _send(process, signal.SIGTERM)


def _send(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def _ended_children() -> list[tuple[int, int]]:
    """Ids and statuses of the children, adopted ones too, that ended since the last call."""
    found: list[tuple[int, int]] = []
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(ended)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise a command, and return the exit code.

    Args:
        argv: settings, `--`, the command; absent: this process's command line.
    """
    with lasting_streams():
        return _supervise(list(sys.argv[1:] if argv is None else argv))


def _supervise(own: list[str]) -> int:
    command: list[str] = []
    if "--" in own:
        place = own.index("--")
        own, command = own[:place], own[place + 1 :]
    if "--help" in own or "-h" in own:
        text = help_text(usage=USAGE, purpose=PURPOSE, sections=("supervise",), flags=())
        sys.stdout.write(text + "\n")
        return 0
    setup_logging()
    try:
        line = parse_command_line(own, flags=(), sections=("supervise",))
        if not command:
            raise UsageError("no command; write it after --, such as: -- vlal train --ranks 2")
        with tempfile.TemporaryDirectory(prefix="vlal-supervise-") as folder:
            return Supervisor(line.config.supervise, exit_file=Path(folder, "code")).run(command)
    except VlalError as error:
        sys.stderr.write(f"supervise: error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
