"""Files read by Prometheus (file_sd targets) and by node_exporter (text files).

A process that ends in order removes its target; that of a killed one stays, so that the missing
process is noticed. node_exporter shows a text file until the next run replaces it or somebody
removes it. A file that cannot be written is logged and stops nothing.
"""

import hashlib
import json
import logging
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from vlal_dist.observability.metric_definitions import JOB, Metric, Readings
from vlal_dist.storage.local import replacing

logger = logging.getLogger(__name__)

EVERY_INTERFACE = ("", "0.0.0.0", "::")
LAST_SUCCESS = "vlal_job_last_success_timestamp_seconds"


class Target:
    """The file_sd file of one process: `[{"targets": ["HOST:PORT"], "labels": {...}}]`.

    Args:
        folder: where all runs of the machine (or of a shared file system) announce themselves.
        run: root of the run, as an absolute path or URL.
        role: what the process does, such as `train`.
        rank: its number in the run.
    """

    def __init__(self, folder: Path, *, run: str, role: str, rank: int) -> None:
        self._labels = {"run": run, "role": role, "rank": str(rank), "node": socket.gethostname()}
        self._prefix = f"{role}-{_slug(run)}-"
        self.path = folder / f"{self._prefix}{rank}.json"

    def write(self, *, host: str, port: int) -> None:
        """Announce an endpoint.

        Args:
            host: address it is bound to; for every interface, this machine's name is announced.
            port: the port it is bound to.
        """
        where = socket.gethostname() if host in EVERY_INTERFACE else host
        where = f"[{where}]" if ":" in where else where
        text = json.dumps([{"targets": [f"{where}:{port}"], "labels": self._labels}], indent=1)
        try:
            with replacing(self.path) as unfinished:
                unfinished.write_text(text + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: no name for a file
            logger.warning(
                "%s: not announced to Prometheus: %s; set observability.targets", self.path, error
            )

    def remove(self) -> None:
        """Withdraw the announcement."""
        _remove(self.path)

    def remove_others(self, *, world_size: int) -> None:
        """Remove the files of an earlier start of this run on more ranks."""
        for path in self.path.parent.glob(f"{self._prefix}*.json"):
            rank = path.stem.removeprefix(self._prefix)
            if rank.isdecimal() and int(rank) >= world_size:
                _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        logger.warning("%s: not removed: %s; remove it by hand", path, error)


class TextFile:
    """A file `vlal-WHAT-ROOT.prom` of node_exporter's textfile collector.

    Args:
        folder: that of the collector (`--collector.textfile.directory`).
        what: the program that the metrics are of, such as `pack`.
        root: the root that they are of, as an absolute path or URL.
    """

    def __init__(self, folder: Path, *, what: str, root: str) -> None:
        self.path = folder / f"vlal-{what}-{_slug(root)}.prom"
        self._warned = False

    def write(self, table: Mapping[str, Metric], readings: Readings) -> None:
        """Replace the file; only the first failure is logged.

        Args:
            table: metrics by name.
            readings: their values; a metric without any is omitted.
        """
        try:
            with replacing(self.path) as unfinished:
                unfinished.write_text(exposition(table, readings), encoding="utf-8")
        except (OSError, ValueError) as error:
            if not self._warned:
                logger.warning(
                    "%s: not written for Prometheus: %s; set observability.textfiles",
                    self.path,
                    error,
                )
            self._warned = True

    def last_success(self) -> float:
        """When the program last succeeded, as the file says, in seconds since 1970; 0: never."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return 0.0
        found = re.search(rf"^{LAST_SUCCESS}{{.*}} ([0-9.e+]+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def write_job_end(folder: Path, *, program: str, root: str, code: int, seconds: float) -> None:
    """Write the metrics of `JOB` for a program that ended.

    Args:
        folder: of the collector.
        program: its name.
        root: the root it wrote, as an absolute path or URL.
        code: exit code; 0 makes this the last success.
        seconds: its duration.
    """
    file = TextFile(folder, what=program, root=root)
    labels = (program, root)
    readings: dict[tuple[str, ...], float] = {
        (LAST_SUCCESS, *labels): time.time() if code == 0 else file.last_success(),
        ("vlal_job_duration_seconds", *labels): seconds,
        ("vlal_job_exit_code", *labels): code,
    }
    file.write(JOB, readings)


def exposition(table: Mapping[str, Metric], readings: Readings) -> str:
    """Metrics in Prometheus' text format."""
    lines = []
    for name, metric in table.items():
        series = [(labels, value) for (of, *labels), value in readings.items() if of == name]
        if series:
            lines += [f"# HELP {name} {_escaped(metric.text)}", f"# TYPE {name} {metric.kind}"]
        for labels, value in series:
            pairs = zip(metric.labels, labels, strict=True)
            shown = ",".join(f'{label}="{_escaped(text, quote=True)}"' for label, text in pairs)
            lines.append(f"{name}{{{shown}}} {value!r}" if shown else f"{name} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def _slug(root: str) -> str:
    """A name for files: readable, and different for different roots."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", root).strip("-")[-60:]
    return f"{readable}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
