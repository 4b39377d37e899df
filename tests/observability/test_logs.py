"""Progress on standard error: rate and remaining time, on a terminal and in a log."""

import io
import time

import pytest

from vlal_dist.observability.logs import Progress


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_the_remaining_time(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress("pack", total=400, unit="samples") as bar:
        bar.stream, bar.terminal = stream, terminal
        now[0] += 10
        bar.advance(100)
        now[0] += 3640
        bar.advance(200)
    lines = stream.getvalue().replace("\r", "\n").replace("\x1b[K", "").strip().splitlines()
    filled = "[=======                     ] " if terminal else ""
    assert lines[0].strip() == f"{filled}pack: 100/400 samples, 10.0/s, 10 s, 30 s left".strip()
    assert lines[1].endswith("pack: 300/400 samples, 0.1/s, 1:00:50, 20:17 left")
    assert lines[-1].endswith("pack: 300/400 samples, 0.1/s, 1:00:50")
