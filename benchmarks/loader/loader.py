"""Our training stream beside webdataset, litdata and mosaicml-streaming, and beside its ceiling.

    make peers                                    # once: the other loaders, in .peers
    python benchmarks/loader/loader.py [--quick] [--json FILE] [--markdown FILE] [--data FOLDER]

Crops of 60x80 pixels (about 2 kB) to 64x64 and photos of 500x375 (about 90 kB) to 224x224; batches
of 64 images and labels; warm page cache; each loader in processes of its own, one after the other,
their order reversed from round to round; medians over rounds. Every peer decodes with our decode
function, and as shipped. Our checksums are on. The ceiling is our decode function in a bare loop.

With two processes we run two ranks with one decoding thread each; the peers two workers, and a main
process that only collects. One process means one core. S3 is Ceph's gateway on the same cores: its
CPU seconds are taken out of the ratio, and printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.loader.data import CROPS, PHOTOS, Kind, make  # noqa: E402
from benchmarks.loader.table import PEERS, Figures, write  # noqa: E402

PEER_PYTHON = ROOT / ".peers/bin/python"
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


@dataclass(frozen=True)
class Bench:
    """Where the data is and how long to measure.

    Attributes:
        folder: of the data.
        seconds, warmup: of each run.
        s3_roots: kind -> s3:// root; empty: no server.
        server_pids: of the server's processes.
    """

    folder: Path
    seconds: float
    warmup: float
    s3_roots: dict[str, str]
    server_pids: list[int]

    def run(self, entry: Entry) -> Figures:
        """Measure one entry."""
        if entry.name in PEERS:
            return self._peer(entry)
        commands = [self._own(entry, rank) for rank in range(entry.processes)]
        found = run_together(commands)
        per_s = sum(one["samples"] / one["seconds"] for one in found)
        cpu = sum(one["cpu_seconds"] for one in found)
        samples = sum(one["samples"] for one in found)
        # Each rank saw the whole server, while it measured itself.
        server = statistics.mean(one["server_cpu_seconds"] / one["seconds"] for one in found)
        return Figures(per_s, samples / cpu, server)

    def _own(self, entry: Entry, rank: int) -> list[str]:
        root = str(self.folder / entry.kind.name / "dataset")
        command = [sys.executable, str(ROOT / "benchmarks/loader/run.py"), entry.name]
        command += [self.s3_roots[entry.kind.name] if entry.s3 else root]
        options = {
            "cache": self.folder / "cache",
            "side": entry.kind.side,
            "batch": BATCH,
            "rank": rank,
            "ranks": entry.processes,
            "warmup": self.warmup,
            "seconds": self.seconds,
        }
        options |= {"cores": 1} if entry.processes == 1 else {}
        command += [word for k, v in options.items() for word in (f"--{k}", str(v))]
        return command + (["--server-pids", *map(str, self.server_pids)] if entry.s3 else [])

    def _peer(self, entry: Entry) -> Figures:
        one = entry.processes == 1
        command = [str(PEER_PYTHON), str(ROOT / "benchmarks/peers/run_peer.py"), entry.name]
        command += [str(self.folder / entry.kind.name / "peers"), "--variant", entry.variant]
        options = {
            "attributes": 591,
            "side": entry.kind.side,
            "batch": BATCH,
            "workers": 0 if one else entry.processes,
            "cores": entry.processes,
            "warmup": self.warmup,
            "seconds": self.seconds,
        }
        command += [word for k, v in options.items() for word in (f"--{k}", str(v))]
        (found,) = run_together([command])
        return Figures(found["samples_per_s"], found["samples_per_cpu_s"])


def run_together(commands: Sequence[list[str]]) -> list[dict[str, Any]]:
    """Run processes side by side; the JSON object that each prints last."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    found = []
    for process in running:
        output, errors = process.communicate(timeout=300)
        if process.returncode:
            raise SystemExit(f"{' '.join(process.args)}\n{errors[-2000:]}")  # type: ignore[arg-type]
        found.append(json.loads(output.strip().splitlines()[-1]))
    return found


def prepare(folder: Path, kinds: Sequence[Kind]) -> dict[str, str | None]:
    """Make the data, converted for the peers; per peer, why it is absent (None: it is there)."""
    for kind in kinds:
        make(folder, kind)
    if not PEER_PYTHON.exists():
        return dict.fromkeys(PEERS, "no .peers environment: run make peers")
    told = json.loads((ROOT / ".peers/peers.json").read_text())
    absent = {peer: told[peer]["absent"] for peer in PEERS}
    for kind in kinds:
        data = folder / kind.name
        command = [str(PEER_PYTHON), str(ROOT / "benchmarks/peers/convert.py")]
        command += [str(data / "dataset"), str(data / "peers"), "--peers"]
        command += [peer for peer in PEERS if absent[peer] is None]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    return absent


@contextmanager
def s3_copies(folder: Path, kinds: Sequence[Kind]) -> Iterator[tuple[dict[str, str], Any]]:
    """The datasets in a Ceph gateway of our own; nothing where Ceph is not installed."""
    from tests.fixtures.ceph import ACCESS_KEY, SECRET_KEY, CephError, Cluster

    cluster = Cluster(Path(tempfile.mkdtemp(prefix="vlal-bench-")))
    try:
        cluster.start()
    except CephError as error:
        print(f"no S3 figures: {error}", file=sys.stderr)
        yield {}, None
        return
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": cluster.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        import boto3

        from vlal_dist.storage.store import open_store

        boto3.client("s3").create_bucket(Bucket="bench")
        roots = {}
        for kind in kinds:
            roots[kind.name] = f"s3://bench/{kind.name}"
            source, target = folder / kind.name / "dataset", open_store(roots[kind.name])
            for path in sorted(p for p in source.rglob("*") if p.is_file()):
                target.create(path.relative_to(source).as_posix(), path)
        yield roots, cluster
    finally:
        cluster.stop(kill=True)


def entries(
    kinds: Sequence[Kind], *, absent: dict[str, str | None], quick: bool, s3: bool
) -> list[Entry]:
    """What is measured, in order."""
    found = []
    for kind in kinds:
        for processes in (2,) if quick else (2, 1):
            found += [Entry(name, kind, processes) for name in ("ceiling", "ours")]
            present = [peer for peer in PEERS if absent[peer] is None]
            found += [Entry(peer, kind, processes) for peer in present]
            if processes == 2 and not quick:
                found += [Entry(peer, kind, 2, variant="as_shipped") for peer in present]
        found += [Entry("ours", kind, 2, s3=True)] if s3 else []
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "runs/bench-loader")
    parser.add_argument("--quick", action="store_true", help="headline figures within two minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    kinds, rounds = (CROPS, PHOTOS), 1 if arguments.quick else arguments.rounds
    absent = prepare(arguments.data, kinds)
    for peer, reason in absent.items():
        if reason:
            print(f"{peer} is absent: {reason}", file=sys.stderr)
    with s3_copies(arguments.data, kinds) as (roots, cluster):
        bench = Bench(
            folder=arguments.data,
            seconds=1.5 if arguments.quick else 3.0,
            warmup=0.5 if arguments.quick else 0.7,
            s3_roots=roots,
            server_pids=cluster.pids if cluster else [],
        )
        planned = entries(kinds, absent=absent, quick=arguments.quick, s3=bool(roots))
        results: dict[str, list[Figures]] = {entry.label: [] for entry in planned}
        for number in range(rounds):
            for entry in planned if number % 2 == 0 else planned[::-1]:
                results[entry.label].append(bench.run(entry))
                rate = results[entry.label][-1].per_s
                print(f"round {number + 1}: {entry.label} {rate:,.0f}/s", file=sys.stderr)
            text = write(results, json_path=arguments.json, markdown_path=arguments.markdown)
    print(text)


if __name__ == "__main__":
    main()
