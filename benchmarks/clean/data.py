"""Made-up annotations of any number of instances, with VAW's numbers of names and labels.

    python -m benchmarks.clean.data FOLDER --instances 2600000 [--format parquet|jsonl|json]

Objects are named by a Zipf law (2,260 names), and each has its own 16 to 200 of 620 attributes, of
which an instance has 1.8 as present and 1.8 as absent on average. Every 5,000th instance stands in
the file twice, some boxes are small, some labels stand in both lists.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from benchmarks.common.harness import make_parser

OBJECTS, ATTRIBUTES, SEED, ROWS = 2260, 620, 7, 1 << 16
SHARES = {"train": 0.83, "val": 0.05, "test": 0.12}
"""Of VAW's 260,895 instances."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("instance_id", pa.string()),
        ("instance_bbox", pa.list_(pa.float64())),
        ("object_name", pa.string()),
        ("positive_attributes", pa.list_(pa.string())),
        ("negative_attributes", pa.list_(pa.string())),
    ]
)


def batches(number: int, first: int) -> Iterator[pa.RecordBatch]:
    """Records `first` to `first + number - 1`, in batches of 65,536."""
    rng = np.random.default_rng(SEED)
    share = 1 / np.arange(1, OBJECTS + 1) ** 0.9
    own = np.sort(rng.integers(0, ATTRIBUTES, (OBJECTS, 200)), axis=1)
    size = rng.integers(16, 200, OBJECTS)
    objects = np.array([f"object {n}" for n in range(OBJECTS)], dtype=object)
    names = np.array([f"attribute {n}" for n in range(ATTRIBUTES)], dtype=object)
    rng = np.random.default_rng([SEED, first])
    law = share / share.sum()
    for start in range(first, first + number, ROWS):
        count = min(ROWS, first + number - start)
        row = np.arange(start, start + count)
        kind = rng.choice(OBJECTS, count, p=law)
        box = rng.integers(0, 400, (count, 4)) + np.array([0.0, 0.5, 20.0, 20.0])
        lists = []
        for _ in range(2):
            lengths = rng.poisson(1.8, count)
            of = np.repeat(kind, lengths)
            chosen = own[of, (rng.random(len(of)) * size[of]).astype(np.int64)]
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            lists.append(pa.ListArray.from_arrays(pa.array(ends), pa.array(names[chosen])))
        columns = [
            pa.array([str(n // 4) for n in row]),
            pa.array([str(2_000_000_000 + n) for n in row]),
            pa.ListArray.from_arrays(
                pa.array(np.arange(0, 4 * count + 1, 4, dtype=np.int32)), pa.array(box.ravel())
            ),
            pa.array(objects[kind]),
            *lists,
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        yield batch
        yield batch.take(pa.array(np.flatnonzero(row % 5000 == 0)))


def write(folder: Path, number: int, form: str) -> dict[str, list[str]]:
    """The files of each split, as `clean.annotations` takes them; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    first, files = 0, {}
    for split, share in SHARES.items():
        count = round(share * number)
        path = folder / f"{split}-{number}.{form}"
        files[split] = [str(path)]
        if not path.exists():
            part = path.with_suffix(".part")
            if form == "parquet":
                with pyarrow.parquet.ParquetWriter(part, SCHEMA) as writer:
                    for batch in batches(count, first):
                        writer.write_batch(batch)
            else:
                _write_text(part, batches(count, first), lines=form == "jsonl")
            part.rename(path)
        first += count
    return files


def _write_text(path: Path, found: Iterator[pa.RecordBatch], *, lines: bool) -> None:
    between = ""
    with path.open("w", encoding="utf-8") as file:
        file.write("" if lines else "[")
        for batch in found:
            for record in batch.to_pylist():
                file.write(f"{between}{json.dumps(record)}")
                between = "\n" if lines else ",\n"
        file.write("\n" if lines else "]\n")


def main() -> None:
    """Write the files of one size."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instances", type=int, required=True)
    parser.add_argument("--format", choices=("parquet", "jsonl", "json"), default="parquet")
    args = parser.parse_args()
    print(write(args.folder, args.instances, args.format))


if __name__ == "__main__":
    main()
