"""Instances into the columns of `clean`, and back."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pyarrow.parquet as pq

from shard_tools.clean.columns import BATCH, SPLITS, Rows, named_batch
from shard_tools.clean.files import RejectFile
from shard_tools.clean.records import Instance, Reject
from shard_tools.clean.steps import Cleaned, clean_rows
from shard_tools.clean.wordnet import WordNet
from vlal_dist.config.sections import CleanConfig
from vlal_dist.vocabulary import Vocabulary


def read_rows(instances: Sequence[Instance], folder: Path, *, batch: int = BATCH) -> Rows:
    """As `read_annotations` leaves them."""
    folder.mkdir(exist_ok=True)
    rows = Rows(folder / "rows")
    for first in range(0, len(instances), batch):
        some = instances[first : first + batch]
        splits = pa.array([SPLITS.index(i.split) for i in some], pa.uint8())
        rows.append(named_batch(some, lambda _, splits=splits: splits))
    return rows


@dataclass(frozen=True)
class Result:
    """What `clean_rows` gives, its tables as instances by split."""

    cleaned: Cleaned
    instances: list[Instance]
    hidden: list[tuple[str, tuple[str, ...], tuple[str, ...]]]
    rejects: list[Reject]


def clean(
    instances: Sequence[Instance],
    *,
    merge: Mapping[str, str] | WordNet = MappingProxyType({}),
    known: Vocabulary | None = None,
    batch: int = BATCH,
    **settings: object,
) -> Result:
    """Run the steps."""
    config = CleanConfig.model_validate(settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with RejectFile(folder / "rejects.parquet") as rejects:
            cleaned = clean_rows(
                read_rows(instances, folder, batch=batch),
                config,
                splits=SPLITS,
                merge=merge,
                known=known,
                rejects=rejects,
                folder=folder,
            )
        objects = cleaned.objects if known is None else known.objects
        attributes = cleaned.attributes if known is None else known.attributes

        def names(row: Mapping[str, list[int]]) -> list[tuple[str, ...]]:
            return [tuple(attributes[n] for n in row[one]) for one in ("positive", "negative")]

        found = [
            Instance(
                split,
                row["instance_id"],
                row["image_id"],
                objects[row["object_id"]],
                tuple(row["box"]),
                *names(row),
            )
            for split, path in cleaned.tables.items()
            for row in pq.read_table(path).to_pylist()
        ]
        hidden = [
            (row["instance_id"], *names(row))
            for path in cleaned.hidden.values()
            for row in pq.read_table(path).to_pylist()
        ]
        found_rejects = [Reject(**row) for row in pq.read_table(rejects.path).to_pylist()]
    return Result(cleaned, found, hidden, found_rejects)
