"""One measured process of our own loader, or of the ceiling; started by loader.py.

The ceiling is our decode function in a bare loop over JPEG bytes in memory, writing into as many
preallocated batches as a loader hands out and prepares.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.harness import measure, pin
from vlal_dist.config.sections import DataConfig, TrainingConfig
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.decode import decode_into
from vlal_dist.data.loading.loader import TrainLoader
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan

BUFFERS = 6
SEED = 1


def ours(arguments: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of this rank, epoch after epoch."""
    dataset = open_dataset(arguments.root, cache=arguments.cache)
    corpus = ConcatSplits([open_split(dataset, "train")])
    data = DataConfig(image_size=arguments.side, threads=1)
    loader = TrainLoader(
        BatchBuilder(ShardReader(corpus), dataset, data),
        EpochPlan(corpus, seed=SEED),
        TrainingConfig(batch_size=arguments.batch * arguments.ranks, seed=SEED),
        rank=arguments.rank,
        world_size=arguments.ranks,
    )
    epoch = 0
    while True:
        for step in loader.epoch(epoch, 0):
            for batch in step.micro_batches:
                yield batch.image, batch.label
        epoch += 1


def ceiling(arguments: argparse.Namespace) -> Iterator[tuple[np.ndarray, None]]:
    """Batches of nothing but decoded images."""
    dataset = open_dataset(arguments.root, cache=arguments.cache)
    reader = ShardReader(ConcatSplits([open_split(dataset, "train")]))
    rows = np.arange(arguments.rank, len(reader.corpus), arguments.ranks)
    at = reader.locate(np.random.default_rng(SEED).permutation(rows))
    found = reader.read(at, 0, len(at.rows))
    jpgs = [bytes(data[slice(*at.jpg[n])]) for n, data in enumerate(found)]  # type: ignore[index]
    size, side = arguments.batch, arguments.side
    batches = np.zeros((BUFFERS, size, side, side, 3), dtype=np.uint8)
    place = 0
    while True:
        for batch in batches:
            for slot in batch:
                decode_into(jpgs[place], slot)
                place = (place + 1) % len(jpgs)
            yield batch, None


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("ours", "ceiling"))
    parser.add_argument("root")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--warmup", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--cores", type=int)
    arguments = parser.parse_args()
    if arguments.cores:
        pin(sorted(os.sched_getaffinity(0))[: arguments.cores])
    torch.set_num_threads(1)
    loader = ours(arguments) if arguments.what == "ours" else ceiling(arguments)
    found = measure(loader, warmup_s=arguments.warmup, seconds=arguments.seconds)
    print(json.dumps(asdict(found)), flush=True)
    # Threads still make batches ahead; nothing of them is wanted.
    os._exit(0)


if __name__ == "__main__":
    main()
