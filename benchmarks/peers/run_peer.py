"""Measure one peer's loader, or digest what it delivers; runs in `.peers`.

    PYTHONPATH=. .peers/bin/python benchmarks/peers/run_peer.py webdataset OUT --variant ours \
        --side 64 --attributes 248 --batch 64 --workers 2 --seconds 10 --json FILE

OUT is the folder that `convert` wrote. With `--workers 0` one process does all the work, else the
main process only collects batches. `--cores N` keeps the process and its children on N cores.
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.batches import Batch, Settings
from benchmarks.peers.measure import digest_epoch, measure, warm_page_cache

DISTRIBUTIONS = {
    "webdataset": "webdataset",
    "litdata": "litdata",
    "streaming": "mosaicml-streaming",
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=DISTRIBUTIONS)
    parser.add_argument("data", type=Path, help="the folder that convert wrote")
    parser.add_argument("--variant", choices=("ours", "as_shipped"), required=True)
    parser.add_argument("--side", type=int, default=64, help="image side, pixels")
    parser.add_argument("--attributes", type=int, required=True, help="width of the labels")
    parser.add_argument("--batch", type=int, default=64, help="samples of a batch")
    parser.add_argument("--workers", type=int, default=0, help="worker processes")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds after the first batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds to measure")
    parser.add_argument("--cores", type=int, help="cores to use; default: all that are allowed")
    parser.add_argument("--digest", action="store_true", help="digest one epoch, measure nothing")
    parser.add_argument("--json", type=Path, help="where the result goes")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure (or digest) and return the result."""
    settings = Settings(
        data=arguments.data,
        variant=arguments.variant,
        side=arguments.side,
        attributes=arguments.attributes,
        batch_size=arguments.batch,
        workers=arguments.workers,
    )
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    torch.set_num_threads(1)  # as DataLoader does in its workers: processes share the cores
    # Batches cross as names of shared memory. The default passes descriptors, for which a thread of
    # the worker must win the interpreter from the loading: 4 to 8 % slower for every peer.
    torch.multiprocessing.set_sharing_strategy("file_system")
    folder = arguments.data / arguments.peer
    warm_page_cache(folder if arguments.peer == "webdataset" else folder / settings.folder)
    module = importlib.import_module(f"benchmarks.peers.with_{arguments.peer}")
    loader = Checked(module.make_loader(settings), settings)
    result = {
        "peer": arguments.peer,
        "version": importlib.metadata.version(DISTRIBUTIONS[arguments.peer]),
        "variant": arguments.variant,
        "workers": arguments.workers,
        "side": arguments.side,
        "batch": arguments.batch,
    }
    if arguments.digest:
        return {**result, **digest_epoch(loader)}
    found = measure(loader, warmup_s=arguments.warmup, seconds=arguments.seconds)
    per_second = {
        "samples_per_s": found.samples / found.seconds,
        "samples_per_cpu_s": found.samples / found.cpu_seconds,
    }
    return {**result, **asdict(found), **per_second}


class Checked:
    """A loader whose every batch is what all peers are compared on."""

    def __init__(self, loader: Iterable[Batch], settings: Settings) -> None:
        self.loader = loader
        side = settings.side
        self.expected = ((side, side, 3), torch.uint8, (settings.attributes,), torch.int8)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        for image, label in self.loader:
            found = (tuple(image.shape[1:]), image.dtype, tuple(label.shape[1:]), label.dtype)
            if found != self.expected or len(image) != len(label) or not image.is_contiguous():
                raise SystemExit(f"batches of {found}, expected {self.expected}")
            yield image, label


def main() -> None:
    """Run, write the result, leave no worker."""
    arguments = parse_arguments()
    result = run(arguments)
    text = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    for child in multiprocessing.active_children():
        child.terminate()
        child.join()


if __name__ == "__main__":
    main()
