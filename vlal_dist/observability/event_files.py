"""TensorBoard event files, written with TensorBoard's own record writer and without torch."""

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from vlal_dist.observability.trackers import Record, Tracker

PATTERN = "events.out.tfevents."


class EventFiles(Tracker):
    """Writes one event file; TensorBoard reads all files of a folder as one run.

    Args:
        folder: created if it does not exist.
        step: of the run at its start. Above 0 TensorBoard discards the steps after it, which will
            be logged again; at 0 the files of an earlier run are removed.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if step == 0:
            for old in folder.glob(f"{PATTERN}*"):
                old.unlink()
        # TensorBoard reads the files in the order of their names.
        name = f"{PATTERN}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._bytes = folder / name, 0
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        # TensorBoard discards at the second START of a folder, so the first one must exist too.
        start = SessionLog(status=SessionLog.START)
        self._append(version, Event(wall_time=time.time(), step=step + 1, session_log=start))

    def log(self, record: Record) -> None:
        """Append a record.

        Raises:
            OSError: the disk is full or gone.
        """
        values = [
            Summary.Value(tag=f"{record.kind}/{name}", simple_value=value)
            for name, value in record.values.items()
        ]
        summary = Summary(value=values)
        self._append(Event(wall_time=record.time, step=record.step, summary=summary))

    def _append(self, *events: Event) -> None:
        framed = io.BytesIO()
        writer = RecordWriter(framed)
        for event in events:
            writer.write(event.SerializeToString())
        with self._path.open("ab") as file:
            if file.tell() > self._bytes:  # a full disk truncated a record: it would hide the rest
                file.truncate(self._bytes)
            file.write(framed.getvalue())
        self._bytes = self._path.stat().st_size
