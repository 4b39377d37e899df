"""`metrics.jsonl`: the numbers that a run published, one JSON object a line."""

import json
import logging
from collections.abc import Callable, Mapping

from vlal_dist.errors import NotFoundError, VlalError
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricsLog:
    """Writer of `metrics.jsonl`: appends to a local file, or keeps the lines of a remote one.

    Args:
        store: the run root.
        step: that the run starts from; lines of later steps are dropped, as they will be written
            again.
        also: called with each record.
    """

    def __init__(
        self, store: Store, *, step: int, also: Callable[[Mapping[str, object]], None]
    ) -> None:
        self._store, self._also = store, also
        self._local = store.local_path(METRICS)
        self._data = lines_until(store, METRICS, step=step)
        store.replace(METRICS, self._data)

    def write(self, record: Mapping[str, object]) -> None:
        """Add a line. A disk that is full or gone is logged, and stops nothing."""
        self._also(record)
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        if self._local is None:
            self._data += line
            return
        try:
            with self._local.open("ab") as file:
                file.write(line)
        except OSError as error:
            logger.warning("%s: a line was not written: %s", self._local, error)

    def flush(self) -> None:
        """Upload the lines of a remote run root; a failure is logged, and stops nothing."""
        if self._local is None:
            try:
                self._store.replace(METRICS, self._data)
            except VlalError as error:
                logger.warning("%s was not written, the next save retries: %s", METRICS, error)


def lines_until(store: Store, key: str, *, step: int) -> bytes:
    """The lines of a JSON lines file up to a step, none at step 0; damaged lines are dropped."""
    try:
        data = store.read(key) if step else b""
    except NotFoundError:
        return b""
    kept = []
    for line in data.splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: dropped a damaged line of %d bytes", key, len(line))
    return b"".join(kept)
