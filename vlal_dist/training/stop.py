"""Stop requests of a run: signals, and the end of the launcher.

SIGTERM to the `deepspeed` command ends that command alone: the process that started the ranks and
the ranks themselves go on. So a rank checks its launcher between steps as well.

Launchers signal ranks at different moments (DeepSpeed's up to 30 s apart) or die without a signal.
No rank acts on its own request: `Ranks.agree` makes all of them save and leave after the same step.
"""

import os
import signal
from collections.abc import Sequence
from types import FrameType

from vlal_dist.processes import Process, command_line, look_at

PROGRAM_WORDS = 4
"""`python -u -m MODULE`: where a command line names its program; later words are arguments."""
INIT = 1
ENDED = Process(pid=-1, parent=-1, started=-1)


def launcher_processes() -> list[Process]:
    """Two processes of DeepSpeed, or torchrun's one; none if a shell started this process.

    What started the launcher itself (a shell, ssh, a scheduler) may end before it.
    """
    parent = look_at(os.getppid())
    if parent is None:
        return []
    words = command_line(parent.pid)[:PROGRAM_WORDS]
    if _runs(parent, "torchrun") or "torch.distributed.run" in words:
        return [parent]
    if "deepspeed.launcher.launch" not in words:
        return []
    front = look_at(parent.parent)
    if front is not None and _runs(front, "deepspeed"):
        return [parent, front]
    if parent.parent == INIT and os.environ.get("CROSS_SIZE") == "1":
        # On a single machine the front process starts the other: it has ended already.
        return [parent, ENDED]
    return [parent]


def _runs(process: Process, program: str) -> bool:
    words = command_line(process.pid)[:PROGRAM_WORDS]
    return program in {word.rpartition("/")[2] for word in words}


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends on request some time before a job's end."""
LAUNCHER_GONE = "launcher_gone"


class StopRequest:
    """Context in which SIGNALS only set a flag; the old handlers return at its end.

    Must be entered in the main thread, as Python demands of signal handlers.

    Args:
        launcher: processes that started this rank; the end of one is a request, too.

    Attributes:
        received: name of the first signal, or LAUNCHER_GONE, or None.
    """

    def __init__(self, launcher: Sequence[Process]) -> None:
        self.received: str | None = None
        self._launcher = launcher
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        if self.received is None and not all(one.is_alive() for one in self._launcher):
            self.received = LAUNCHER_GONE
        return self.received is not None

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
