"""Quality of the stream's shuffle, beside a full shuffle and beside webdataset's buffer.

    python -m benchmarks.shuffle.shuffle DATASET [--split train] [--batch 64] [--markdown FILE]

Reads the index and the tables, no image. For several orders of one epoch:

* neighbours: distance in the dataset (rows) between samples that follow each other in the order,
  divided by what a full shuffle gives (N / 3 on average), and the share of pairs from one block;
* batches by source: chi-square per degree of freedom of the tenths of the dataset that a batch's
  samples come from: 1 for a full shuffle, more where batches hold neighbours. This is what training
  would feel if the dataset were stored sorted (pack stores it shuffled);
* batches by label: variance over batches of the number of samples with an attribute, divided by
  that of a full shuffle, averaged over the attributes.
"""

import numpy as np
import numpy.typing as npt

from benchmarks.common.harness import ROOT, finish, make_parser, table
from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, open_split, read_labels
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.shuffle import Shuffle, choose_lanes

Order = npt.NDArray[np.int64]
EPOCHS, TENTHS, SEED = 5, 10, 3


def stream_orders(split: Split, *, lanes: int, window_blocks: int) -> list[Order]:
    """The order of some epochs."""
    stream = Shuffle(
        EpochPlan(ConcatSplits([split]), seed=SEED),
        lanes=lanes,
        window_blocks=window_blocks,
        seed=SEED,
    )
    return [stream.at(e, np.arange(stream.length(e))).row for e in range(EPOCHS)]


def full_orders(count: int) -> list[Order]:
    """Uniformly random orders."""
    rng = np.random.default_rng(SEED)
    return [rng.permutation(count) for _ in range(EPOCHS)]


def webdataset_orders(dataset: Dataset, split: Split, buffer: int) -> list[Order]:
    """The order in which webdataset reads the same tars: shuffled shards, then a buffer."""
    import webdataset as wds

    root = dataset.store.local_path(f"{split.name}/shards")
    assert root is not None
    urls = [str(root / shard.name) for shard in split.shards]
    row_of = {key: n for n, key in enumerate(read_labels(dataset, split.name)["key"].to_pylist())}
    orders = []
    for epoch in range(EPOCHS):
        loader = wds.WebDataset(urls, shardshuffle=len(urls), seed=epoch, empty_check=False)
        keys = [sample["__key__"] for sample in loader.shuffle(buffer)]
        orders.append(np.array([row_of[key.rpartition("/")[2]] for key in keys]))
    return orders


def label_matrix(dataset: Dataset, split: str) -> npt.NDArray[np.float64]:
    """Whether each sample carries each attribute: [N, A], attributes with 1 % or more only."""
    positive = read_labels(dataset, split)["positive"].to_pylist()
    matrix = np.zeros((len(positive), len(dataset.vocabulary.attributes)))
    for row, ids in enumerate(positive):
        matrix[row, ids] = 1
    return matrix[:, matrix.mean(0) >= 0.01]


def measure(
    orders: list[Order], *, block: Order, labels: npt.NDArray[np.float64], batch: int
) -> tuple[float, float, float, float]:
    """The four measures of the table, averaged over the epochs."""
    found = []
    for order in orders:
        count = len(order)
        steps = np.abs(np.diff(order))
        batches = order[: count // batch * batch].reshape(-1, batch)
        tenth = batches * TENTHS // len(block)
        held = np.stack([(tenth == n).sum(1) for n in range(TENTHS)], 1)
        expected = batch / TENTHS
        chi = ((held - expected) ** 2 / expected).sum(1).mean() / (TENTHS - 1)
        per_batch = labels[batches].sum(1)
        share = labels.mean(0)
        # Drawn without replacement: the hypergeometric variance.
        variance = batch * share * (1 - share) * (len(block) - batch) / (len(block) - 1)
        by_label = (per_batch.var(0) / variance).mean()
        same = (block[order[1:]] == block[order[:-1]]).mean()
        found.append((steps.mean() / (count / 3), same, chi, by_label))
    return tuple(np.mean(found, axis=0).tolist())


def main() -> None:
    """Measure and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--buffer", type=int, default=1000)
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.dataset, cache=ROOT / "runs/cache")
    split = open_split(dataset, arguments.split)
    lanes = choose_lanes(num_blocks=len(split.blocks), world_size=1)
    orders = {
        "full shuffle": full_orders(split.num_samples),
        f"ours, {lanes} lanes, window 3": stream_orders(split, lanes=lanes, window_blocks=3),
        "ours, 1 lane, window 3": stream_orders(split, lanes=1, window_blocks=3),
        f"webdataset, shuffle({arguments.buffer})": webdataset_orders(
            dataset, split, arguments.buffer
        ),
        "stored order": [np.arange(split.num_samples)],
    }
    block = np.repeat(np.arange(len(split.blocks)), split.blocks.samples)
    labels = label_matrix(dataset, arguments.split)
    rows = []
    for name, found in orders.items():
        distance, same, source, label = measure(
            found, block=block, labels=labels, batch=arguments.batch
        )
        shares = [f"{distance:.3f}", f"{100 * same:.2f} %", f"{source:.2f}", f"{label:.2f}"]
        rows.append([name, *shares])
    head = ["order", "neighbours' distance", "pairs in one block", "by source", "by label"]
    title = (
        f"{dataset.name}: {split.num_samples} samples in {len(split.blocks)} blocks, "
        f"batches of {arguments.batch}, {EPOCHS} epochs"
    )
    finish(arguments, f"{title}\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
