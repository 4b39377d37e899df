"""`metrics.jsonl`: what a run published, a JSON object a line."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, appended to a local file or kept for a remote one.

    Args:
        kept: lines of the run so far.
        append_to: the local file; None for a remote root.
        replace: overwrites the whole file.
        also: gets each record too.
    """

    def __init__(
        self,
        *,
        kept: bytes,
        append_to: Path | None,
        replace: Callable[[bytes], None],
        also: Callable[[Mapping[str, object]], None],
    ) -> None:
        self._data, self._append_to, self._replace, self._also = kept, append_to, replace, also
        replace(kept)

    def write(self, record: Mapping[str, object]) -> None:
        """Add a line. A disk that is full or gone is warned of, and stops nothing."""
        self._also(record)
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        if self._append_to is None:
            self._data += line
            return
        try:
            with self._append_to.open("ab") as file:
                file.write(line)
        except OSError as error:
            logger.warning("%s: a line was not written: %s", self._append_to, error)

    def flush(self) -> None:
        """Upload the lines so far, for a remote root."""
        if self._append_to is None:
            self._replace(self._data)


def lines_until(data: bytes, *, step: int) -> bytes:
    """The lines of a `metrics.jsonl` up to a step: what a resumed run keeps.

    Later lines will be written again; a line that a kill cut in two is dropped.
    """
    kept = []
    for line in data.splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            logger.warning("metrics.jsonl: dropped a damaged line of %d bytes", len(line))
    return b"".join(kept)
