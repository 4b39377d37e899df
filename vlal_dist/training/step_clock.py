"""Where a step's time goes on this rank: its own passes, and the summing of gradients over ranks.

The first tells a slow rank from those that wait for it: the sum ends for all ranks at once.
"""

import time
from typing import Any

import torch


class StepClock:
    """Times the two parts of steps; nothing waits for a device because of it.

    On a CPU every step, by the monotonic clock. A GPU works behind the host's clock: there events
    go into its stream, in some steps only, and are read once the device has passed them.

    Args:
        device: where the model lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._timing = False
        self._marks: list[Any] = []
        self._times: list[tuple[float, float]] = []

    def begin(self, *, sampled: bool) -> None:
        """A step's first pass begins.

        Args:
            sampled: whether to time the step on a GPU, too.
        """
        self._timing, self._marks = sampled or not self._on_gpu, []
        self.mark()

    def mark(self) -> None:
        """A part ends: first the passes, then the sum."""
        if not self._timing:
            return
        if not self._on_gpu:
            self._marks.append(time.monotonic())
            self._settle()
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def take(self) -> list[tuple[float, float]]:
        """(seconds of the passes, seconds of the sum) of each step timed since the last call.

        On a GPU a step is in it once the device has finished both.
        """
        if self._on_gpu and self._marks and self._marks[-1].query():
            self._settle()
        taken, self._times = self._times, []
        return taken

    def _settle(self) -> None:
        """Turn the marks of a whole step into seconds."""
        if len(self._marks) < 3:
            return
        begin, passed, summed = self._marks
        self._times.append((self._seconds(begin, passed), self._seconds(passed, summed)))
        self._marks = []

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin)
