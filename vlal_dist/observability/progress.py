"""Progress of long work: one bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import TextIO

BAR = 28


class Progress:
    """Counts work done and shows it on standard error.

    Args:
        label: what is being done.
        total: units of work in all; 0 when unknown.
        unit: name of a unit, plural.
        every_s: seconds between lines when standard error is no terminal.
    """

    def __init__(self, label: str, *, total: int, unit: str, every_s: float = 5.0) -> None:
        self.label, self.total, self.unit, self.every_s = label, total, unit, every_s
        self.done = 0
        self.stream: TextIO = sys.stderr
        self.terminal = self.stream.isatty()
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show(last=True)

    def advance(self, count: int = 1) -> None:
        """Add finished units and show them when it is time."""
        self.done += count
        now = time.monotonic()
        if now - self.shown >= (0.1 if self.terminal else self.every_s):
            self.shown = now
            self._show(last=False)

    def _show(self, *, last: bool) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        total = f"/{self.total}" if self.total else ""
        text = f"{self.label}: {self.done}{total} {self.unit}, {self.done / seconds:.1f}/s"
        if self.terminal:
            filled = min(BAR, self.done * BAR // self.total) if self.total else 0
            bar = "=" * filled + " " * (BAR - filled)
            self.stream.write(f"\r[{bar}] {text}" + ("\n" if last else ""))
        else:
            self.stream.write(text + f", {seconds:.0f} s\n")
        self.stream.flush()
