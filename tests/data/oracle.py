"""What an epoch must hold, worked out a second time: from the files alone, in plain integers.

Formats and formulas are those of design 3 and 4. Nothing of vlal_dist is imported, so that no
mistake of the stream can hide in what it is compared with.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

Visit = tuple[int, int]
"""(uid, running count of that sample's visits)."""
PHASE = 4
_MASK, _GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & _MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def ledger(visits: Iterable[Visit]) -> dict[str, int]:
    """Count, and sum of the mixed visits."""
    mixed = [mix((mix(uid) + visit * _GOLDEN) & _MASK) for uid, visit in visits]
    return {"count": len(mixed), "sum": sum(mixed) & _MASK}


def uids(split: Path, *, name: str) -> list[int]:
    """uid of every row, from index.arrow, and once more from labels.parquet's instance ids."""
    with pa.ipc.open_file(str(split / "index.arrow")) as index:
        found: list[int] = index.get_batch(0).column("uid").to_pylist()
    labels = pa.parquet.read_table(split / "labels.parquet")
    assert found == [uid_of(name, one) for one in labels["instance_id"].to_pylist()]
    return found


def uid_of(name: str, instance_id: str) -> int:
    """The first 8 bytes of sha256(dataset name, NUL, instance id)."""
    return int.from_bytes(hashlib.sha256(f"{name}\0{instance_id}".encode()).digest()[:8], "big")


def planned(uid: Sequence[int], rates: Sequence[float], *, seed: int, epoch: int) -> list[Visit]:
    """All visits of an epoch; `rates`: passes per epoch over each row."""
    return [
        (one, visit)
        for one, rate in zip(uid, rates, strict=True)
        for visit in range(*(visits_before(one, rate, seed=seed, epoch=epoch + k) for k in (0, 1)))
    ]


def visits_before(uid: int, rate: float, *, seed: int, epoch: int) -> int:
    """floor(rate x epoch + u), u in [0, 1) keyed by (seed, uid); the rate a multiple of 2^-16."""
    key = 0
    for word in (seed, PHASE):
        key = mix((key + word * _GOLDEN + _GOLDEN) & _MASK)
    phase = mix(mix((uid + key) & _MASK) ^ key)
    return (round(rate * 2**16) * epoch * 2**48 + phase) >> 64 if rate else 0


def write_split(
    folder: Path,
    shards: Sequence[Sequence[int]],
    *,
    name: str = "made",
    positive: Sequence[Sequence[int]] | None = None,
) -> Path:
    """Write the files of a split that has no tars.

    Args:
        folder: of the split.
        shards: for each shard the samples of its blocks.
        name: of the dataset.
        positive: positive attribute ids of each sample.
    """
    blocks = [(shard, size) for shard, sizes in enumerate(shards) for size in sizes]
    first = [sum(size for _, size in blocks[:k]) for k in range(len(blocks))]
    total = sum(size for _, size in blocks)
    instances = [f"{row:06d}" for row in range(total)]
    folder.mkdir(parents=True)
    index = {
        "uid": pa.array([uid_of(name, one) for one in instances], pa.uint64()),
        "shard": pa.array([shard for shard, size in blocks for _ in range(size)], pa.uint32()),
        "offset": pa.array([0] * total, pa.uint64()),
    }
    parts = ("jpg", "json", "likelihood")
    others = [f"{part}_{what}" for part in parts for what in ("offset", "length")]
    index |= {one: pa.array([0] * total, "uint32") for one in ("length", *others)}
    index |= {one: pa.array([0] * total, "uint32") for one in ("object_id", "crc32")}
    _write_arrow(folder / "index.arrow", index)
    columns = {
        "shard": pa.array([shard for shard, _ in blocks], pa.uint32()),
        "first_row": pa.array(first, pa.uint64()),
        "samples": pa.array([size for _, size in blocks], pa.uint32()),
        "offset": pa.array([0] * len(blocks), pa.uint64()),
        "bytes": pa.array([0] * len(blocks), pa.uint64()),
    }
    _write_arrow(folder / "blocks.arrow", columns)
    ids = pa.list_(pa.uint32())
    labels = {
        "key": pa.array(instances, pa.string()),
        "instance_id": pa.array(instances, pa.string()),
        "positive": pa.array(positive or [[]] * total, ids),
        "negative": pa.array([[]] * total, ids),
    }
    pa.parquet.write_table(pa.table(labels), folder / "labels.parquet")
    return folder


def _write_arrow(path: Path, columns: dict[str, pa.Array]) -> None:
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
