"""From process start to the first batch of a resumed epoch, from 10 thousand to 10 million rows.

    python -m benchmarks.resume.resume [--folder build/resume] [--quick] [--s3 s3://BUCKET]

Each measurement is a process of its own that does what a rank of a resumed run does with its data:
imports, opening the dataset, laying out the order of epoch 3, and the first batch of 64 at a third
of the epoch. The index is made up (see data.py); what is read and decoded is real. "First open" is
the very first start on a node, which hashes index and blocks once. "Per-row rates" are those of
`data.repeat_threshold`, which are laid out row by row. Delete the folder, or keep it for next time.
"""

import argparse
import json
import os
import shutil
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.common.harness import (
    ROOT,
    finish,
    in_rounds,
    machine,
    make_parser,
    options,
    run_together,
    table,
)

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
PARTS = ("imports", "open", "order", "batch")
EPOCH, BATCH, SEED = 3, 64, 99
Result = dict[str, float]


def measure(root: str, cache: Path, *, started: float, repeat_threshold: float) -> Result:
    """What a rank does until its first batch: seconds of each part, memory in MB."""
    from vlal_dist.config.sections import DataConfig, TrainingConfig
    from vlal_dist.data.loading.batch_builder import BatchBuilder
    from vlal_dist.data.loading.loader import TrainLoader
    from vlal_dist.data.loading.shard_reader import ShardReader
    from vlal_dist.data.order.epoch_plan import EpochPlan
    from vlal_dist.data.order.mixture import open_mixture

    times = [started, time.monotonic()]
    mixture = open_mixture(root, DataConfig(repeat_threshold=repeat_threshold), cache=cache)
    times.append(time.monotonic())
    builder = BatchBuilder(ShardReader(mixture.corpus), mixture.dataset, DataConfig())
    plan = EpochPlan(mixture.corpus, seed=SEED, passes=mixture.passes, factor=mixture.factor)
    loader = TrainLoader(builder, plan, TrainingConfig(batch_size=BATCH, seed=SEED))
    start = loader.stream.length(EPOCH) // 3
    times.append(time.monotonic())
    steps = loader.epoch(EPOCH, start)
    step = next(steps)
    times.append(time.monotonic())
    assert step.samples == BATCH and step.position == start + BATCH
    assert len(step.micro_batches[0]) == BATCH
    found = dict(zip(PARTS, (b - a for a, b in pairwise(times)), strict=True))
    found |= {"total": times[-1] - started, "cpu": time.process_time(), "peak": _peak_mb()}
    found["mapped"] = _mapped_mb()
    found["lanes"], found["blocks"] = loader.lanes, len(mixture.corpus.samples)
    steps.close()
    loader.close()
    return found


def _peak_mb() -> float:
    # ru_maxrss would not do: a child starts with its parent's.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def _mapped_mb() -> float:
    """Pages of index and blocks that this process touched: shared, and given back on demand."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[-1]
        if "-" in line.split()[0]:  # the head of a mapping; digests are names of the cache
            ours = name.endswith(".arrow") or len(Path(name).name) == 64
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total / 1024


def spawn(root: str, cache: Path, *, cold: bool = False, repeat_threshold: float = 0.0) -> Result:
    """One measurement in a fresh process; cold: the kernel first drops the split's files."""
    for path in Path(root, "train").iterdir() if cold else ():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "benchmarks.resume.resume"]
    values = {"cache": cache, "repeat-threshold": repeat_threshold, "started": time.monotonic()}
    (found,) = run_together([[*command, "--root", root, *options(values)]])
    return dict(found)


def main() -> None:
    """Measure, or, with --root, be measured."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/resume")
    parser.add_argument("--s3", help="s3://BUCKET to copy the largest dataset to; AWS_* as always")
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--repeat-threshold", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.root:
        threshold = given.repeat_threshold
        found = measure(given.root, given.cache, started=given.started, repeat_threshold=threshold)
        print(json.dumps(found))
        return
    from benchmarks.resume.data import make_rows
    from vlal_dist.storage.store import open_store

    given.folder.mkdir(parents=True, exist_ok=True)
    sizes, rounds = (SIZES[:1], 1) if given.quick else (SIZES, given.rounds)
    roots = {f"{rows:,}": str(make_rows(given.folder, rows)) for rows in sizes}
    if given.s3:
        made, target = make_rows(given.folder, sizes[-1], one_shard=True), open_store(given.s3)
        for path in sorted(p for p in made.rglob("*") if p.is_file()):
            target.create(path.relative_to(made).as_posix(), path)
        roots[f"{sizes[-1]:,}, in a bucket"] = given.s3
    calls, first_open = {}, {}
    for name, root in roots.items():
        cache = given.folder / f"cache {name}"
        shutil.rmtree(cache, ignore_errors=True)
        first_open[name] = spawn(root, cache)["open"]
        calls[name] = partial(spawn, root, cache)
        if "bucket" not in name:
            calls[f"{name}, per-row rates"] = partial(spawn, root, cache, repeat_threshold=0.3)
            calls[f"{name}, not in the page cache"] = partial(spawn, root, cache, cold=True)
    numbers = {
        name: {key: median(run[key] for run in runs) for key in runs[0]}
        for name, runs in in_rounds(calls, rounds).items()
    }
    seconds = (*PARTS, "total", "cpu")
    head = ["rows", "blocks", "lanes", *(f"{part} s" for part in seconds), "peak MB", "mapped MB"]
    rows = [
        [name, f"{found['blocks']:,.0f}", f"{found['lanes']:.0f}"]
        + [f"{found[part]:.2f}" for part in seconds]
        + [f"{found['peak']:.0f}", f"{found['mapped']:.1f}"]
        + [f"{first_open[name]:.2f}" if name in first_open else ""]
        for name, found in numbers.items()
    ]
    text = table([*head, "first open s"], rows)
    finish(given, f"{text}\nMedians of {rounds} fresh processes, {machine()}\n", numbers)


if __name__ == "__main__":
    main()
