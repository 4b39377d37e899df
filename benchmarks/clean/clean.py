"""Seconds and memory of `clean`: VAW's 260,895 instances, 2.6 million and 26 million.

    python -m benchmarks.clean.clean FOLDER [--quick] [--before TREE] [--markdown FILE]

The data is made up (`benchmarks.clean.data`), with VAW's rules: small boxes dropped, names merged
by WordNet, instances without positives dropped. Each line is a process of its own, its memory the
peak resident size that the kernel reports. `--before TREE`, a checkout of another version, cleans
the JSON in turn with this one, and the bytes of both are compared.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.clean.data import write
from benchmarks.common.harness import ROOT, finish, in_rounds, machine, make_parser, spread, table

VAW = 260_895
RULES = {"merge": "wordnet", "min_side": 50, "require_positive": True}


class Run(NamedTuple):
    """Seconds of wall and processor, peak memory, and digests of the tables."""

    seconds: float
    cpu_seconds: float
    peak_gb: float
    digests: dict[str, str]


def clean(folder: Path, files: dict[str, list[str]], *, tree: Path = ROOT) -> Run:
    """Clean some files by the code in a tree."""
    out, config = folder / "instances", folder / "config.yaml"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    config.write_text(
        json.dumps({"clean": {"annotations": files, **RULES}, "paths": {"instances": str(out)}})
    )
    # The child's own child, so that the usage is of this run alone.
    code = (
        "import json, resource, subprocess, sys; "
        "subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([u.ru_utime + u.ru_stime, u.ru_maxrss]))"
    )
    command = [sys.executable, "-m", "shard_tools", "clean", "--config", str(config)]
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=env, cwd=tree, check=True, capture_output=True
    )
    seconds = time.perf_counter() - start
    cpu, peak_kb = json.loads(done.stdout)
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("*.parquet"))
    }
    return Run(seconds, cpu, peak_kb * 1024 / 1e9, digests)


def main() -> None:
    """Make the data, measure, print the table."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, help="another version's checkout")
    args = parser.parse_args()
    sizes = [("json", VAW), ("jsonl", VAW), ("parquet", VAW)]
    if not args.quick:
        sizes += [("parquet", 2_600_000), ("parquet", 26_000_000)]
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for form, number in sizes:
        files = write(args.folder / "data", number, form)
        calls = {"this": lambda files=files: clean(args.folder, files)}
        if args.before is not None and (form, number) == sizes[0]:
            calls["before"] = lambda files=files: clean(
                args.folder, files, tree=args.before.resolve()
            )
        rounds = args.rounds if number == VAW else 1
        found = in_rounds(calls, rounds)
        if len({tuple(run.digests.items()) for runs in found.values() for run in runs}) > 1:
            raise SystemExit(f"{form}, {number}: the tables differ")
        for name, runs in found.items():
            cpu = statistics.median(run.cpu_seconds for run in runs)
            rows.append(
                (
                    f"{form}{', before' if name == 'before' else ''}",
                    f"{number:,}",
                    spread([run.seconds for run in runs], ".1f"),
                    spread([run.cpu_seconds for run in runs], ".1f"),
                    f"{1e6 * cpu / number:.1f}",
                    f"{max(run.peak_gb for run in runs):.2f}",
                )
            )
    head = ("annotations", "instances", "s", "CPU s", "CPU us each", "peak GB")

    finish(args, f"{table(head, rows)}\n{machine()}")


if __name__ == "__main__":
    main()
