"""Measure one peer's loader; runs in `.peers`, started by loader.py.

OUT is the folder that `convert` wrote. With `--workers 0` one process does all the work, else the
main process only collects batches. `--cores N` keeps the process and its children on N cores.
"""

import argparse
import importlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common.harness import measure
from benchmarks.peers.batches import Batch, Settings


class Checked:
    """A loader whose batches are checked for the shapes and types that all peers deliver."""

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
    """Measure, print the result, leave no worker."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=("webdataset", "litdata", "streaming"))
    parser.add_argument("data", type=Path, help="the folder that convert wrote")
    parser.add_argument("--variant", choices=("ours", "as_shipped"), required=True)
    parser.add_argument("--side", type=int, default=64, help="image side, pixels")
    parser.add_argument("--attributes", type=int, required=True, help="width of the labels")
    parser.add_argument("--batch", type=int, default=64, help="samples of a batch")
    parser.add_argument("--workers", type=int, default=0, help="worker processes")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds after the first batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds to measure")
    parser.add_argument("--cores", type=int, required=True, help="cores to use")
    given = parser.parse_args()
    settings = Settings(
        data=given.data,
        variant=given.variant,
        side=given.side,
        attributes=given.attributes,
        batch_size=given.batch,
        workers=given.workers,
    )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    torch.set_num_threads(1)  # as DataLoader does in its workers: processes share the cores
    # Batches cross as names of shared memory. The default passes descriptors, for which a thread of
    # the worker must win the interpreter from the loading: 4 to 8 % slower for every peer.
    torch.multiprocessing.set_sharing_strategy("file_system")
    folder = given.data / given.peer
    for path in (folder if given.peer == "webdataset" else folder / settings.folder).rglob("*"):
        if path.is_file():
            path.read_bytes()  # into the page cache
    module = importlib.import_module(f"benchmarks.peers.with_{given.peer}")
    loader = Checked(module.make_loader(settings), settings)
    print(json.dumps(asdict(measure(loader, warmup_s=given.warmup, seconds=given.seconds))))
    for child in multiprocessing.active_children():
        child.terminate()
        child.join()


if __name__ == "__main__":
    main()
