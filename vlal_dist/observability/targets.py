"""Telling Prometheus where a rank serves: one small file per rank, in a folder that it watches.

A file of `file_sd`: `[{"targets": ["HOST:PORT"], "labels": {"run": ..., "role": ..., ...}}]`,
complete at once. Whoever ends in order removes it; that of a rank that was killed stays, so that
the missing rank is seen. Nothing here ever stops the work: what fails is warned of.
"""

import json
import logging
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from vlal_dist.observability.whole_files import slug, write_whole

logger = logging.getLogger(__name__)

EVERY_INTERFACE = ("", "0.0.0.0", "::")


class Target:
    """The file of one process.

    Args:
        folder: where all runs of the machine (or of a shared file system) announce themselves.
        run: root of the run, as an absolute path or URL.
        role: what the process does, such as `train`.
        rank: its number in the run.
    """

    def __init__(self, folder: Path, *, run: str, role: str, rank: int) -> None:
        self._labels = {"run": run, "role": role, "rank": str(rank), "node": socket.gethostname()}
        self._folder = folder
        self._prefix = f"{role}-{slug(run)}-"
        self.path = folder / f"{self._prefix}{rank}.json"

    def write(self, *, host: str, port: int) -> None:
        """Announce an endpoint.

        Args:
            host: address that it is bound to; if that is every interface, this machine's name is
                announced.
            port: the one that it really has.
        """
        where = socket.gethostname() if host in EVERY_INTERFACE else host
        where = f"[{where}]" if ":" in where else where
        text = json.dumps([{"targets": [f"{where}:{port}"], "labels": self._labels}], indent=1)
        try:
            write_whole(self.path, text + "\n")
        except OSError as error:
            logger.warning(
                "%s: not announced to Prometheus: %s; set observability.targets", self.path, error
            )

    def remove(self) -> None:
        """Take the announcement back."""
        _remove(self.path)

    def remove_others(self, *, world_size: int) -> None:
        """Remove what an earlier start of this run on more ranks left behind."""
        pattern = re.compile(re.escape(self._prefix) + r"(\d+)\.json")
        for path in _listed(self._folder):
            found = pattern.fullmatch(path.name)
            if found and int(found[1]) >= world_size:
                _remove(path)


def _listed(folder: Path) -> Iterable[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: not removed: %s; remove it by hand", path, error)
