"""A W&B run; only the process of `tracker_process.py` imports this."""

import json
from pathlib import Path

import wandb

from vlal_dist.observability.trackers import Record


class WandbRun:
    """The run with that id, begun or continued.

    W&B cannot take back what it has: what it was told of steps after the checkpoint stays, and
    those steps are not told again. Online W&B itself refuses them; offline it does not know the
    files of earlier starts, so that the last steps are noted beside them.

    Args:
        identity: id of the run.
        folder: in which W&B makes its folder `wandb`; None: as its own variables say.

    Raises:
        wandb.Error: no account, or no answer within W&B's own time for it.
    """

    def __init__(self, identity: str, *, folder: str | None) -> None:
        self._run = wandb.init(id=identity, resume="allow", dir=folder)
        self._note = Path(self._run.sync_dir).parent / f"{identity}.steps.json"
        self._had: dict[str, int] = {}
        if self._run.offline and self._note.exists():
            self._had = json.loads(self._note.read_text(encoding="utf-8"))

    def log(self, record: Record) -> None:
        """Hand a record to W&B's own process, which sends and keeps it."""
        if record.step <= self._had.get(record.kind, -1):
            return
        values = {f"{record.kind}/{name}": value for name, value in record.values.items()}
        self._run.log(values, step=record.step)
        if self._run.offline:
            self._had[record.kind] = record.step
            self._note.write_text(json.dumps(self._had), encoding="utf-8")

    def close(self, *, done: bool) -> None:
        """Send what is left and say how it ended."""
        self._run.finish(exit_code=0 if done else 1)

    def abandon(self) -> None:
        """The process is ended from outside."""
