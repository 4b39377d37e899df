"""Stopping on request: a signal raises a flag, the loop looks at it between steps.

Launchers signal ranks at different moments (DeepSpeed's up to 30 s apart), or die and leave them
alone; so no rank acts on its own flag: `Ranks.agree` makes all of them save and leave after the
same step.
"""

import signal
from types import FrameType, TracebackType

from vlal_dist.training.launcher import Launcher

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
