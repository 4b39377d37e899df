"""Stop requests of a run: signals, and the end of the launcher.

SIGTERM to the `deepspeed` command ends that command alone: the process that started the ranks and
the ranks themselves go on. So a rank checks its launcher between steps as well.

Launchers signal ranks at different moments (DeepSpeed's up to 30 s apart) or die without a signal.
No rank acts on its own request: `Ranks.agree` makes all of them save and leave after the same step.
"""

import os
import signal
from types import FrameType

import psutil
from psutil import Process

from vlal_dist.processes import is_alive

PROGRAM_WORDS = 4
"""`python -u -m MODULE`: where a command line names its program; later words are arguments."""
INIT = 1


Launcher = list[Process | None]


def launcher_processes() -> Launcher:
    """Two processes of DeepSpeed, or torchrun's one; none if a shell started this process.

    None stands for one that has ended. What started the launcher itself (a shell, ssh, a
    scheduler) may end before it.
    """
    parent = Process().parent()
    words = _program(parent)
    if words & {"torchrun", "torch.distributed.run", "vlal_dist.training.launch"}:
        return [parent]
    if parent is None or "deepspeed.launcher.launch" not in words:
        return []
    front = parent.parent()
    if "deepspeed" in _program(front):
        return [parent, front]
    if (front is None or front.pid == INIT) and os.environ.get("CROSS_SIZE") == "1":
        # On a single machine the front process starts the other: it has ended already.
        return [parent, None]
    return [parent]


def _program(process: Process | None) -> set[str]:
    """The first words of a process's command, without folders; empty if they cannot be read."""
    try:
        words = process.cmdline()[:PROGRAM_WORDS] if process is not None else []
    except psutil.Error:
        return set()
    return {word.rpartition("/")[2] for word in words}


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends on request some time before a job's end."""
LAUNCHER_GONE = "launcher_gone"


class StopRequest:
    """A request to stop this run: one of SIGNALS, or the end of the launcher.

    Args:
        launcher: processes that started this rank.

    Attributes:
        received: name of the first signal, or LAUNCHER_GONE, or None.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.received: str | None = None
        self._launcher = launcher

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        gone = any(one is None or not is_alive(one) for one in self._launcher)
        if self.received is None and gone:
            self.received = LAUNCHER_GONE
        return self.received is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handler of SIGNALS."""
        self.received = self.received or signal.Signals(number).name
