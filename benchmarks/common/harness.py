"""Harness of the benchmarks: flags, measured processes, rounds, ratios, tables, files.

Imports neither torch nor vlal_dist: the processes of the peers use it in their own environments.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
Result = TypeVar("Result")
Numbers = dict[str, float | None]


def make_parser(doc: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less data, one or two rounds")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    return parser


def finish(given: argparse.Namespace, text: str, numbers: Mapping[str, Any] | None = None) -> None:
    """Print the tables; write them and the figures where the command line says."""
    print(text)
    if given.markdown:
        given.markdown.write_text(text)
    if given.json:
        given.json.write_text(json.dumps(numbers, indent=2) + "\n")


def options(values: Mapping[str, object]) -> list[str]:
    """Command-line flags of some values."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run_together(commands: Sequence[Sequence[str]], *, limit_s: float = 900) -> list[Any]:
    """Run processes side by side, offline; the JSON object that each prints last.

    Raises:
        RuntimeError: one of them failed, with the end of its errors.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    running = [subprocess.Popen(c, env=env, stdout=pipe, stderr=pipe, text=True) for c in commands]
    found = []
    for process, command in zip(running, commands, strict=True):
        output, errors = process.communicate(timeout=limit_s)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{errors[-2000:].strip()}")
        last = output.strip().splitlines()[-1]
        found.append(json.loads(last[last.index("{") :]))  # a progress bar may stand before it
    return found


def why_absent(python: Path, module: str) -> str | None:
    """Why an environment cannot import a module; None: it can."""
    if not python.exists():
        return f"no {python}"
    command = [str(python), "-c", f"import {module}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def in_rounds(calls: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """The results of some calls in turn, by name, one for each round; every other one reversed."""
    results: dict[str, list[Result]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            results[name].append(calls[name]())
            print(f"round {number + 1}: {name} {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def ratios(ours: Sequence[float], *others: Sequence[float]) -> list[float]:
    """Our rate over the fastest of the others, for each round."""
    return [mine / max(theirs) for mine, *theirs in zip(ours, *others, strict=True)]


def spread(values: Sequence[float], form: str = ",.2f") -> str:
    """Median, and in brackets the least and the most."""
    middle = format(statistics.median(values), form)
    return f"{middle} ({min(values):{form}} to {max(values):{form}})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Cores and load, for the foot of a table."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{os.cpu_count()} cores, load averages at the end {load}."


def pin(cores: Collection[int]) -> None:
    """Keep every thread of this process on these cores, and all that it starts from now on."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


@dataclass(frozen=True)
class Measured:
    """A measured stretch.

    Attributes:
        samples: delivered in it.
        seconds: wall time.
        cpu_seconds: of this process and all its descendants.
    """

    samples: int
    seconds: float
    cpu_seconds: float


def measure(loader: Iterable[Any], *, warmup_s: float, seconds: float) -> Measured:
    """Take batches, epoch after epoch, and count those that arrive after the warm-up.

    The warm-up begins at the first batch, so that starting workers is never counted. Batches are
    tuples whose first member has the length of the batch.
    """
    first = mark = None
    cpu, samples = 0.0, 0
    while True:
        delivered = False
        for batch in loader:
            now, delivered = time.perf_counter(), True
            first = now if first is None else first
            if mark is None:
                # The batch that ends the warm-up was made in it.
                if now - first >= warmup_s:
                    mark, cpu = now, cpu_seconds()
                continue
            samples += len(batch[0])
            if now - mark >= seconds:
                return Measured(samples, now - mark, cpu_seconds() - cpu)
        if not delivered:
            raise SystemExit("the loader delivers nothing")


def cpu_seconds() -> float:
    """User and system time of this process and its descendants, living and reaped; 10 ms steps."""
    parent: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is a name in brackets that may hold anything.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parent[int(path.parent.name)] = int(fields[1])
        ticks[int(path.parent.name)] = sum(map(int, fields[11:15]))
    mine = {os.getpid()}
    while found := {pid for pid, above in parent.items() if above in mine} - mine:
        mine |= found
    return sum(ticks[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")
