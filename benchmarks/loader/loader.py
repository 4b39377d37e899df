"""Our training stream beside webdataset, litdata and mosaicml-streaming, and beside its ceiling.

    make peers                                    # once: the other loaders, in .peers
    python -m benchmarks.loader.loader [--quick] [--s3 s3://BUCKET]

Crops of 60x80 pixels (about 2 kB) to 64x64 and photos of 500x375 (about 90 kB) to 224x224; batches
of 64 images and labels; warm page cache; each loader in processes of its own, one after the other,
their order reversed from round to round; medians over rounds. Every peer decodes with our decode
function, and as shipped. Our checksums are on. The ceiling is our decode function in a bare loop.

With two processes we run two ranks with one decoding thread each; the peers two workers, and a main
process that only collects. One process means one core. The datasets are copied to the bucket.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.common.data import CROPS, PHOTOS, Kind, make
from benchmarks.common.harness import (
    ROOT,
    Numbers,
    finish,
    in_rounds,
    make_parser,
    options,
    ratios,
    run_together,
    spread,
    table,
    why_absent,
)
from vlal_dist.storage.store import open_store

PEER_PYTHON = ROOT / ".peers/bin/python"
PEERS = {"webdataset": "webdataset", "litdata": "litdata", "streaming": "mosaicml"}
"""Peer -> its name in the ratios."""
BATCH = 64


@dataclass(frozen=True)
class Entry:
    """One thing to measure.

    Attributes:
        name: `ours`, `ceiling`, or a peer.
        kind: the data.
        processes: 1 or 2.
        variant: of a peer, `ours` or `as_shipped`.
        s3: read from S3.
    """

    name: str
    kind: Kind
    processes: int
    variant: str = "ours"
    s3: bool = False

    @property
    def label(self) -> str:
        """Key of the results."""
        parts = [self.name]
        parts += ["as_shipped"] if self.variant == "as_shipped" else []
        parts += ["s3"] if self.s3 else []
        parts += ["photos"] if self.kind is PHOTOS else []
        parts += ["one_process"] if self.processes == 1 else []
        return "_".join(parts)


def entries(absent: dict[str, str | None], *, quick: bool, s3: bool) -> list[Entry]:
    """What is measured, in order."""
    found = []
    present = [peer for peer in PEERS if absent[peer] is None]
    for kind in (CROPS, PHOTOS):
        for processes in (2,) if quick else (2, 1):
            found += [Entry(name, kind, processes) for name in ("ceiling", "ours", *present)]
            if processes == 2 and not quick:
                found += [Entry(peer, kind, 2, variant="as_shipped") for peer in present]
        found += [Entry("ours", kind, 2, s3=True)] if s3 else []
    return found


@dataclass(frozen=True)
class Figures:
    """Samples per second and per CPU second."""

    per_s: float
    per_cpu_s: float


def measure(given: argparse.Namespace, entry: Entry) -> Figures:
    """Run the processes of an entry."""
    data, one = given.data / entry.kind.name, entry.processes == 1
    common: dict[str, object] = {"side": entry.kind.side, "batch": BATCH}
    common |= {"warmup": 0.5, "seconds": 1.5} if given.quick else {"warmup": 0.7, "seconds": 3.0}
    if entry.name in PEERS:
        command = [str(PEER_PYTHON), "-m", "benchmarks.peers.run_peer", entry.name]
        workers = {"workers": 0 if one else 2, "cores": entry.processes, "attributes": 591}
        common |= {"variant": entry.variant, **workers}
        commands = [[*command, str(data / "peers"), *options(common)]]
    else:
        root = f"{given.s3}/{entry.kind.name}" if entry.s3 else str(data / "dataset")
        command = [sys.executable, "-m", "benchmarks.loader.run", entry.name, root]
        common |= {"cache": given.data / "cache", "ranks": entry.processes}
        common |= {"cores": 1} if one else {}
        command += options(common)
        commands = [[*command, "--rank", str(rank)] for rank in range(entry.processes)]
    found = run_together(commands)
    samples, cpu = (sum(run[name] for run in found) for name in ("samples", "cpu_seconds"))
    return Figures(sum(run["samples"] / run["seconds"] for run in found), samples / cpu)


def prepare(given: argparse.Namespace) -> dict[str, str | None]:
    """Make the data, converted for the peers; per peer, why it is absent (None: it is there)."""
    for kind in (CROPS, PHOTOS):
        root = make(given.data, kind)
        if given.s3:
            target = open_store(f"{given.s3}/{kind.name}")
            for path in sorted(p for p in root.rglob("*") if p.is_file()):
                target.create(path.relative_to(root).as_posix(), path)
    absent = {peer: why_absent(PEER_PYTHON, peer) for peer in PEERS}
    present = [peer for peer in PEERS if absent[peer] is None]
    for kind in (CROPS, PHOTOS) if present else ():
        data = given.data / kind.name
        command = [str(PEER_PYTHON), "-m", "benchmarks.peers.convert"]
        command += [str(data / "dataset"), str(data / "peers"), "--peers", *present]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    return absent


def summarise(results: dict[str, list[Figures]]) -> tuple[str, Numbers]:
    """Tables and flat numbers: medians over rounds of rates, and of ratios within a round."""
    rates = {label: [run.per_s for run in runs] for label, runs in results.items()}
    numbers: Numbers = {}
    pairs = {"ceiling": "ceiling"} | {name: peer for peer, name in PEERS.items()}
    pairs |= {f"{name}_as_shipped": f"{peer}_as_shipped" for peer, name in PEERS.items()}
    for suffix in ("", "_one_process", "_photos", "_photos_one_process"):
        for name, other in pairs.items():
            if f"ours{suffix}" in rates and not ("shipped" in name and "process" in suffix):
                numbers[f"ratio_to_{name}{suffix}"] = _median_ratio(
                    rates[f"ours{suffix}"], rates.get(f"{other}{suffix}")
                )
        if f"ours_s3{suffix}" in rates:
            numbers[f"ratio_s3_to_local{suffix}"] = _median_ratio(
                rates[f"ours_s3{suffix}"], rates[f"ours{suffix}"]
            )
    rows = []
    for label, runs in results.items():
        cpu = statistics.median(run.per_cpu_s for run in runs)
        numbers[f"samples_per_s_{label}"] = statistics.median(rates[label])
        numbers[f"samples_per_cpu_s_{label}"] = cpu
        rows.append((label, spread(rates[label], ",.0f"), f"{cpu:,.0f}"))
    text = table(["what", "samples/s, median", "per CPU second"], rows)
    shown = [
        (name, "null" if value is None else f"{value:.2f}")
        for name, value in numbers.items()
        if name.startswith("ratio")
    ]
    return f"{text}\n{table(['ratio', 'median over rounds'], shown)}", numbers


def _median_ratio(ours: Sequence[float], theirs: Sequence[float] | None) -> float | None:
    return None if theirs is None else statistics.median(ratios(ours, theirs))


def main() -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / "runs/bench-loader")
    parser.add_argument("--s3", help="s3://BUCKET to copy the datasets to; AWS_* as always")
    given = parser.parse_args()
    absent = prepare(given)
    for peer, reason in absent.items():
        if reason:
            print(f"{peer} is absent: {reason}; see make peers", file=sys.stderr)
    planned = entries(absent, quick=given.quick, s3=bool(given.s3))
    calls = {entry.label: partial(measure, given, entry) for entry in planned}
    finish(given, *summarise(in_rounds(calls, 1 if given.quick else given.rounds)))


if __name__ == "__main__":
    main()
