"""Requests to stop a run: signals, and the end of its launcher.

SIGTERM to the `deepspeed` command ends that command alone: its child, which started the ranks, and
the ranks go on, with nobody to wait for them. So a rank looks at both between its steps.

Launchers signal ranks at different moments (DeepSpeed's up to 30 s apart), or die and leave them
alone; so no rank acts on its own flag: `Ranks.agree` makes all of them save and leave after the
same step.
"""

import os
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType

from vlal_dist.processes import Process, command_line, look_at, names

PROGRAM_WORDS = 4
"""`python -u -m MODULE`: where a command line names its program; later words are arguments."""
INIT = 1
NOBODY = Process(pid=-1, parent=-1, started=-1)


class Launcher:
    """The processes that started this rank and that it must not outlive.

    Args:
        watched: none: nothing is ever missed.
    """

    def __init__(self, watched: Sequence[Process]) -> None:
        self._watched = tuple(watched)

    @classmethod
    def of_this_process(cls) -> "Launcher":
        """DeepSpeed's two, torchrun's one; none for a process that a shell started.

        What started a launcher (a shell, ssh, a scheduler) may end and leave it to its work.
        """
        parent = look_at(os.getppid())
        if parent is None:
            return cls(())
        words = command_line(parent.pid)[:PROGRAM_WORDS]
        if "torchrun" in names(words) or "torch.distributed.run" in words:
            return cls((parent,))
        if "deepspeed.launcher.launch" not in words:
            return cls(())
        front = look_at(parent.parent)
        if front is not None and "deepspeed" in names(command_line(front.pid)[:PROGRAM_WORDS]):
            return cls((parent, front))
        if parent.parent == INIT and os.environ.get("CROSS_SIZE") == "1":
            # On a single machine the front process starts the other: here it is gone already.
            return cls((parent, NOBODY))
        return cls((parent,))

    def is_gone(self) -> bool:
        """Whether one of them has ended."""
        return not all(process.is_alive() for process in self._watched)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The last is what Slurm sends on request some time before a job's end."""
LAUNCHER_GONE = "launcher_gone"


class StopRequest:
    """Context in which SIGNALS only set a flag; the old handlers return at its end.

    Must be entered in the main thread, as Python demands of signal handlers.

    Args:
        launcher: whose end is a request too.

    Attributes:
        received: name of the first signal, or LAUNCHER_GONE, or None.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.received: str | None = None
        self._launcher = launcher
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        if self.received is None and self._launcher.is_gone():
            self.received = LAUNCHER_GONE
        return self.received is not None

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
