"""Log lines and progress bars on standard error."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from vlal_dist.storage.checks import masked

QUIET = ("botocore", "boto3", "urllib3", "s3transfer", "PIL", "DeepSpeed", "matplotlib")


def setup_logging() -> None:
    """Send the root logger to standard error; other ranks than 0 show warnings only."""
    # As texts: what is no number is refused where ranks are joined, and means nothing to others.
    rank, ranks = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    where = "" if ranks == "1" else f" rank {rank}"
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.WARNING,
        stream=sys.stderr,
        force=True,
    )
    line = f"%(asctime)s{where} %(levelname)s %(name)s: %(message)s"
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Masking(line, datefmt="%H:%M:%S"))
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


class _Masking(logging.Formatter):
    """Lines without the user information of URLs, whichever library logs them."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


STDERR = 2


class _LastingStream:
    """A text stream whose reader may go away (ssh ended, a pipe closed): the rest is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if there is still a reader; what cannot be encoded is escaped."""
        try:
            return self._stream.write(text)
        except UnicodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # ValueError: closed by someone
            self._drop()
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, if there is still a reader."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Lead what follows to nowhere, so that Python's own flush at the exit succeeds, too."""
        with suppress(OSError, ValueError), open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), self._stream.fileno())


@contextmanager
def lasting_streams(*, output: bool = True) -> Iterator[None]:
    """Context in which a closed standard error, or standard output, changes nothing.

    Args:
        output: standard output too; without it, a program that only prints ends with its reader.
    """
    # A descriptor that was closed before the start would be given to the next file opened.
    while (opened := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(opened)
    before = sys.stdout, sys.stderr
    outputs = _LastingStream(before[0] or os.fdopen(1, "w", closefd=False))
    errors = _LastingStream(before[1] or os.fdopen(STDERR, "w", closefd=False))
    if output or before[0] is None:
        sys.stdout = cast(TextIO, outputs)
    sys.stderr = cast(TextIO, errors)
    try:
        yield
    finally:
        outputs.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


BAR = 28


class Progress:
    """Progress of finished units on standard error: a bar on a terminal, lines elsewhere.

    Args:
        label: what is being done.
        total: units of work in all; 0: unknown.
        unit: name of a unit, plural.
        every_s: seconds between lines when standard error is no terminal.
    """

    def __init__(self, label: str, *, total: int, unit: str, every_s: float = 5.0) -> None:
        self.label, self.total, self.unit, self.every_s = label, total, unit, every_s
        self.done = 0
        self.stream = sys.stderr
        self.terminal = self.stream.isatty()
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._show(last=True)

    def advance(self, count: int = 1) -> None:
        """Add finished units, and show them if the last time was long enough ago."""
        self.done += count
        now = time.monotonic()
        if now - self.shown >= (0.1 if self.terminal else self.every_s):
            self.shown = now
            self._show(last=False)

    def _show(self, *, last: bool) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        total = f"/{self.total}" if self.total else ""
        text = f"{self.label}: {self.done}{total} {self.unit}, {self.done / seconds:.1f}/s"
        text += f", {_clock(seconds)}"
        if not last and self.done and self.total:
            text += f", {_clock(seconds * max(0, self.total - self.done) / self.done)} left"
        if self.terminal:
            filled = min(BAR, self.done * BAR // self.total) if self.total else 0
            bar = "=" * filled + " " * (BAR - filled)
            self.stream.write(f"\r[{bar}] {text}" + ("\x1b[K\n" if last else "\x1b[K"))
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    """A duration, such as `12 s`, `3:04` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
