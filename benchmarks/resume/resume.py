"""From process start to the first batch of a resumed epoch, from 10 thousand to 10 million rows.

    python benchmarks/resume/resume.py [--folder build/resume] [--repeats 3] [--no-s3]

Each measurement is a process of its own that does what a rank of a resumed run does with its data:
imports, opening the dataset, laying out the order of epoch 3, and the first batch of 64 at a third
of the epoch. The index is made up (see resume_data.py); what is read and decoded is real. Writes
docs/benchmarks/resume.md. Leave the folder for the next time, or delete it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

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
    builder = BatchBuilder(
        ShardReader(mixture.corpus),
        mixture.dataset,
        DataConfig(),
    )
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


def spawn(root: str, cache: Path, *, repeat_threshold: float = 0.0) -> Result:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--root", root, "--cache", str(cache)]
    command += ["--repeat-threshold", str(repeat_threshold), "--started", str(time.monotonic())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def repeated(
    root: str, cache: Path, times: int, *, cold: bool = False, repeat_threshold: float = 0.0
) -> Result:
    """The median of every number over fresh processes."""
    found = []
    for _ in range(times):
        if cold:
            _forget_pages(Path(root))
        found.append(spawn(root, cache, repeat_threshold=repeat_threshold))
    return {name: median(one[name] for one in found) for name in found[0]}


def _forget_pages(root: Path) -> None:
    """Drop what the kernel holds of the split's files."""
    for path in (root / "train").iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def bucket(folder: Path) -> Iterator[str | None]:
    """The URL of a bucket on a Ceph gateway of our own; None where none can be started."""
    from tests.conftest import ACCESS_KEY, SECRET_KEY, _server
    from tests.fixtures.ceph import CephError, Cluster

    cluster = Cluster(folder / f"ceph-{os.getpid()}")
    try:
        cluster.start()
    except CephError as error:
        print(f"no Ceph gateway ({error}): remote rows are left out", flush=True)
        yield None
        return
    try:
        server = _server("ceph", cluster.endpoint, ACCESS_KEY, SECRET_KEY)
        with server.environment():
            yield server.url()
    finally:
        cluster.stop(kill=True)
        shutil.rmtree(cluster.folder)


def local_lines(folder: Path, sizes: list[int], times: int) -> list[str]:
    """Rows of the first table, and what the first start of all takes."""
    from benchmarks.resume.data import make

    lines = []
    for rows in sizes:
        root, cache = str(make(folder, rows)), folder / f"cache-{rows}"
        shutil.rmtree(cache, ignore_errors=True)
        first = spawn(root, cache)
        lines.append(line(f"{rows:,}", repeated(root, cache, times), first["open"]))
        print(lines[-1], flush=True)
    cold = repeated(root, cache, times, cold=True)
    lines.append(line(f"{rows:,}, not in the page cache", cold, None))
    print(lines[-1], flush=True)
    return lines


def remote_lines(folder: Path, rows: int, times: int) -> list[str]:
    """The row of a root in a bucket."""
    from benchmarks.resume.data import make
    from vlal_dist.storage.store import open_store

    with bucket(folder) as url:
        if url is None:
            return []
        root, store = make(folder, rows, one_shard=True), open_store(url)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                store.create(path.relative_to(root).as_posix(), path)
        cache = folder / "cache-remote"
        shutil.rmtree(cache, ignore_errors=True)
        first = spawn(url, cache)
        found = line(f"{rows:,}, in a bucket", repeated(url, cache, times), first["open"])
        shutil.rmtree(cache)
    print(found, flush=True)
    return [found]


def repeat_lines(folder: Path, sizes: list[int], times: int) -> list[str]:
    """Rows with a rate per row."""
    from benchmarks.resume.data import make

    lines = []
    for rows in sizes:
        root, cache = str(make(folder, rows)), folder / f"cache-{rows}"
        lines.append(line(f"{rows:,}", repeated(root, cache, times, repeat_threshold=0.3), None))
        print(lines[-1], flush=True)
    return lines


def line(name: str, found: Result, first: float | None) -> str:
    """A line of a table."""
    cells = [f"{int(found['blocks']):,}", f"{int(found['lanes'])}"]
    cells += [f"{found[part]:.2f}" for part in (*PARTS, "total", "cpu")]
    cells += [f"{found['peak']:.0f}", f"{found['mapped']:.1f}"]
    cells.append("" if first is None else f"{first:.2f}")
    return f"| {name} | " + " | ".join(cells) + " |"


HEAD = """\
| rows | blocks | lanes | imports | open | order | first batch | total | CPU s | peak MB \
| mapped MB \
| first open |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
TEXT = """\
# Resume to the first batch

{date}, a shared two-core machine (x86_64, 24 GB), local disk, median of {times} fresh processes:

    python benchmarks/resume/resume.py

From process start to the first batch of 64 (224 pixels) of one rank, at a third of epoch 3.
Seconds: imports (Python, torch, pyarrow, ours), open (manifest, vocabulary, index, blocks), order
(epochs 0 and 3 laid out), first batch (five steps looked up, 64 samples read, verified, decoded).
CPU is what the process used in all; the rest of the total is waiting, also for other work on the
machine (load {load:.1f} of 2 cores), which the imports feel most.
Peak is the process's largest resident set; mapped is what of it are pages of index and blocks:
shared by the ranks of a node, and given back when memory is short. The index takes 56 bytes a row.
What a run does besides (model, checkpoint, DeepSpeed) does not depend on the rows.

The index is made up, of {small} crops of 2 kB that every row points to; reads and checks are real.
"First open" is the very first start on a node: index and blocks are hashed once (a local root) or
copied and hashed on the way (a bucket, here a Ceph gateway on the same machine).

{local}
With `data.repeat_threshold` every row has a rate of its own, which is worked out from all labels
and laid out row by row at every start: time and memory grow with the rows, by design.

{repeats}"""


def main() -> None:
    """Measure, or, with --root, be measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build/resume")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/resume.md")
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
    given.folder.mkdir(parents=True, exist_ok=True)
    local = local_lines(given.folder, given.sizes, given.repeats)
    if not given.no_s3:
        local += remote_lines(given.folder, given.sizes[-1], given.repeats)
    repeats = repeat_lines(given.folder, given.sizes, given.repeats)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    text = TEXT.format(
        date=time.strftime("%Y-%m-%d"),
        times=given.repeats,
        small=72,
        load=os.getloadavg()[1],
        local=HEAD + "\n".join(local) + "\n",
        repeats=HEAD.replace("first open", "") + "\n".join(repeats) + "\n",
    )
    given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
