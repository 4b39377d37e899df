"""The cleaning steps of Sec. 3.1, in two passes over the rows, counted in order.

Size filter -> merge of object names -> renames -> deleted attributes -> vocabulary -> instances
without positives -> clashes -> hidden labels. The splits are the annotation files' own.

The first pass counts; from its tally follow all steps that change names, and the vocabulary. The
second one writes the rows that are left, with the ids of the vocabulary.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from shard_tools.clean.columns import I64, INSTANCE_SCHEMA, SPLITS, Lists, Mask, Rows, TableFile
from shard_tools.clean.counts import POLARITIES, Counting, StepCounts, Tally
from shard_tools.clean.files import RejectFile
from shard_tools.clean.hide import Hiding
from shard_tools.clean.names import matching
from shard_tools.clean.records import Reject, shortened
from shard_tools.clean.wordnet import WordNet, merge_table
from vlal_dist.config.sections import CleanConfig
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cleaned:
    """Result of the steps.

    Attributes:
        objects: sorted object names (of all instances before `require_positive`).
        attributes: sorted attribute names (as `objects`, over both lists).
        merges: object name -> representative, for the names that the merge changed.
        counts: step -> counts.
        clashes: (instance, attribute) pairs that stood in both lists.
        tally: of the final rows, whose lists are sorted and disjoint, by ids of the vocabulary.
        tables: split -> file of the final rows, in reading order.
        hidden: key -> file of the hidden labels; empty where the step `hide` did not run.
    """

    objects: tuple[str, ...]
    attributes: tuple[str, ...]
    merges: dict[str, str]
    counts: StepCounts
    clashes: int
    tally: Tally
    tables: dict[str, Path]
    hidden: dict[str, Path]


DELETED, UNKNOWN = -1, -2


@dataclass(frozen=True)
class Ids:
    """Numbers of names as read -> ids of the vocabulary.

    Attributes:
        objects: int64, `UNKNOWN` where a given vocabulary lacks it.
        attributes: int64, `DELETED`, or `UNKNOWN` where a given vocabulary lacks it.
        num_objects, num_attributes: of the vocabulary.
    """

    objects: I64
    attributes: I64
    num_objects: int
    num_attributes: int


def clean_rows(
    rows: Rows,
    settings: CleanConfig,
    *,
    splits: Sequence[str],
    merge: Mapping[str, str] | WordNet,
    known: Vocabulary | None,
    rejects: RejectFile,
    folder: Path,
) -> Cleaned:
    """Run the steps.

    Args:
        rows: as read, in reading order, which the merge depends on.
        settings: what each step does.
        splits: those of which a table is written.
        merge: name -> representative, or the dictionary that decides which names are similar.
        known: the vocabulary to keep to; None: one is made from the names left.
        rejects: gets duplicates, and rows with a name outside the given vocabulary.
        folder: for the tables.

    Raises:
        DataError: one instance id stands for different records.
    """
    repeated = rows.duplicates()
    counts: StepCounts = {}
    names = _change_names(rows, repeated, settings, merge, rejects, counts)
    if known is None:
        objects = _ids(names.objects[number] for number in names.tally.objects())
        attributes = _ids(names.attributes[number] for number in _annotated(names.tally))
    else:
        objects, attributes = dict(known.object_ids), dict(known.attribute_ids)
    ids = names.ids(objects, attributes)
    unknown = None if known is None else _Unknown(names, ids, rejects)
    writing = _Writing(settings, ids, unknown, list(attributes))
    tables, hidden = writing.write(_large(rows, repeated, settings.min_side), splits, folder)
    if known is not None:
        tally = _counted(counts, "known_names", writing.known.tally())
        objects = _ids(known.objects[number] for number in tally.objects())
        attributes = _ids(known.attributes[number] for number in _annotated(tally))
    if settings.require_positive:
        _counted(counts, "require_positive", writing.positive.tally())
    final = writing.final.tally()
    if writing.hiding is not None:
        counts["hide"] = {**final.counts(), **writing.hiding.count(final)}
    clashes = writing.clashes
    return Cleaned(
        tuple(objects), tuple(attributes), names.merges, counts, clashes, final, tables, hidden
    )


def _counted(counts: StepCounts, step: str, tally: Tally) -> Tally:
    """Count and log what a step leaves."""
    counts[step] = tally.counts()
    shown = ("instances", "objects", "attributes", "positive_pairs")
    logger.info("%s: %s", step, ", ".join(f"{counts[step][name]} {name}" for name in shown))
    return tally


@dataclass(frozen=True)
class _Changed:
    """Names after the steps that change them.

    Attributes:
        objects, attributes: names by number.
        renamed: int64, number of an object -> its number after merge and renames.
        merges: object name -> representative, for the names that the merge changed.
        deleted: attributes.
        tally: of all rows that the size filter leaves, after these steps.
    """

    objects: list[str]
    attributes: list[str]
    renamed: I64
    merges: dict[str, str]
    deleted: set[str]
    tally: Tally

    def ids(self, objects: Mapping[str, int], attributes: Mapping[str, int]) -> "Ids":
        """The ids of a vocabulary."""
        id_of = np.array([objects.get(name, UNKNOWN) for name in self.objects], np.int64)
        return Ids(
            objects=id_of[self.renamed],
            attributes=np.array(
                [
                    DELETED if name in self.deleted else attributes.get(name, UNKNOWN)
                    for name in self.attributes
                ],
                np.int64,
            ),
            num_objects=len(objects),
            num_attributes=len(attributes),
        )


def _change_names(
    rows: Rows,
    repeated: I64,
    settings: CleanConfig,
    merge: Mapping[str, str] | WordNet,
    rejects: RejectFile,
    counts: StepCounts,
) -> _Changed:
    """Count all rows, and change names."""
    for table in (merge, settings.renames):
        if isinstance(table, Mapping):
            rows.objects.add(table.values())
    read, large, order = _survey(rows, repeated, settings.min_side, rejects)
    _counted(counts, "read", read)
    _counted(counts, "min_side", large)
    objects, attributes = list(rows.objects.number), list(rows.attributes.number)
    sizes = large.instances.sum(axis=0)
    num_instances = {objects[number]: int(sizes[number]) for number in order}
    table = merge if isinstance(merge, Mapping) else merge_table(num_instances, merge)
    merges = {name: table[name] for name in sorted(num_instances) if table.get(name, name) != name}
    merged = rows.objects.table(merges.items())
    renamed = rows.objects.table(settings.renames.items())
    tally = _counted(counts, "merge", large.mapped(objects=merged))
    tally = _counted(counts, "rename", tally.mapped(objects=renamed))
    left = (attributes[number] for number in _annotated(tally))
    deleted = matching(left, settings.deleted_attributes)
    kept = [-1 if name in deleted else number for number, name in enumerate(attributes)]
    tally = tally.mapped(names=np.array(kept, np.int64))
    _counted(counts, "delete_attributes", tally)
    return _Changed(objects, attributes, renamed[merged], merges, deleted, tally)


def _annotated(tally: Tally) -> I64:
    """Attributes with a label."""
    found = tally.attributes()
    return np.flatnonzero(found["positive"] + found["negative"])


def _ids(names: Iterator[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(names))}


def _survey(
    rows: Rows, repeated: I64, min_side: float, rejects: RejectFile
) -> tuple[Tally, Tally, list[int]]:
    """Tallies of all instances and of the large ones, whose objects are numbered in the order of
    their first appearance; `rejects` gets the duplicates.
    """
    counting = Counting(2 * len(SPLITS), len(rows.objects), len(rows.attributes))
    order: dict[int, None] = {}
    for batch, drop in _with_repeated(rows, repeated):
        if drop.any():
            again = batch.filter(pa.array(drop)).select(["split", "instance_id"]).to_pylist()
            detail = "the same instance was read before"
            rejects.add(
                [Reject(SPLITS[r["split"]], r["instance_id"], "duplicate", detail) for r in again]
            )
            batch = batch.filter(pa.array(~drop))
        large = _is_large(batch, min_side)
        kinds = _numbers(batch, "object_id")
        found, first = np.unique(kinds[large], return_index=True)
        order.update(dict.fromkeys(found[np.argsort(first)].tolist()))
        group = _numbers(batch, "split") + len(SPLITS) * large
        counting.add(group, kinds, {name: Lists.of(batch[name]) for name in POLARITIES})
    tally, splits = counting.tally(), np.arange(len(SPLITS))
    upper = np.concatenate([np.full(len(SPLITS), -1), splits])
    return tally.mapped(groups=np.tile(splits, 2)), tally.mapped(groups=upper), list(order)


def _with_repeated(rows: Rows, repeated: I64) -> Iterator[tuple[pa.RecordBatch, Mask]]:
    """All batches, each with which of its rows repeat an earlier one."""
    first = 0
    for batch in rows:
        start, stop = np.searchsorted(repeated, [first, first + batch.num_rows])
        drop = np.zeros(batch.num_rows, np.bool_)
        drop[repeated[start:stop] - first] = True
        first += batch.num_rows
        yield batch, drop


def _large(rows: Rows, repeated: I64, min_side: float) -> Iterator[pa.RecordBatch]:
    """The rows that the size filter leaves, without duplicates."""
    for batch, drop in _with_repeated(rows, repeated):
        kept = _is_large(batch, min_side) & ~drop
        yield batch if kept.all() else batch.filter(pa.array(kept))


def _is_large(batch: pa.RecordBatch, min_side: float) -> Mask:
    sides = batch["box"].flatten().to_numpy().reshape(-1, 4)[:, 2:]
    return sides.min(axis=1) >= min_side  # type: ignore[no-any-return]


def _numbers(batch: pa.RecordBatch, name: str) -> I64:
    return batch[name].to_numpy().astype(np.int64)  # type: ignore[no-any-return]


class _Unknown:
    """Sets aside rows with a name outside a given vocabulary.

    Args:
        names: of the rows.
        ids: of the vocabulary.
        rejects: gets the rows.
    """

    def __init__(self, names: _Changed, ids: Ids, rejects: RejectFile) -> None:
        self._names, self._ids, self._rejects = names, ids, rejects

    def without(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows whose names are all known."""
        wrong = self._ids.objects[_numbers(batch, "object_id")] == UNKNOWN
        for name in POLARITIES:
            lists = Lists.of(batch[name])
            wrong[lists.row[self._ids.attributes[lists.number] == UNKNOWN]] = True
        if not wrong.any():
            return batch
        names, found = self._names, []
        for row in batch.filter(pa.array(wrong)).to_pylist():
            kind, numbers = row["object_id"], [*row["positive"], *row["negative"]]
            if self._ids.objects[kind] == UNKNOWN:
                reason, detail = "unknown_object", shortened(names.objects[names.renamed[kind]])
            else:
                unknown = [n for n in numbers if self._ids.attributes[n] == UNKNOWN]
                shown = ", ".join(dict.fromkeys(names.attributes[n] for n in unknown))
                reason, detail = "unknown_attribute", shortened(shown, 1000)
            found.append(Reject(SPLITS[row["split"]], row["instance_id"], reason, detail))
        self._rejects.add(found)
        return batch.filter(pa.array(~wrong))


class _Writing:
    """The second pass.

    Attributes:
        known, positive, final: what the steps `known_names`, `require_positive` and the last one
            leave.
        clashes: (instance, attribute) pairs that stood in both lists.
        hiding: None: no label is hidden.
    """

    def __init__(
        self,
        settings: CleanConfig,
        ids: Ids,
        unknown: _Unknown | None,
        attributes: Sequence[str],
    ) -> None:
        self._settings, self._ids, self._unknown = settings, ids, unknown
        size = (len(SPLITS), ids.num_objects, ids.num_attributes)
        self.known, self.positive, self.final = (Counting(*size) for _ in range(3))
        self.clashes = 0
        self.hiding: Hiding | None = None
        if settings.hide != "none":
            self.hiding = Hiding(attributes, seed=settings.hide_seed)

    def write(
        self, batches: Iterator[pa.RecordBatch], splits: Collection[str], folder: Path
    ) -> tuple[dict[str, Path], dict[str, Path]]:
        """Write the tables of some splits: split -> file, and key -> file of hidden labels."""
        files = {}
        with ExitStack() as stack:
            if self.hiding is not None:
                hidden = stack.enter_context(self.hiding.open(folder))
                files[hidden.path.name] = hidden.path
            tables = {}
            for split in splits:
                file = TableFile(folder / f"{split}.parquet", INSTANCE_SCHEMA)
                tables[SPLITS.index(split)] = stack.enter_context(file)
            for batch in batches:
                group, cleaned = self._clean(batch)
                for place, table in tables.items():
                    chosen = group == place
                    if chosen.any():
                        table.append(cleaned if chosen.all() else cleaned.filter(pa.array(chosen)))
            return {split: folder / f"{split}.parquet" for split in splits}, files

    def _clean(self, batch: pa.RecordBatch) -> tuple[I64, pa.RecordBatch]:
        """The splits and rows that are left of some."""
        if self._unknown is not None:
            batch = self._unknown.without(batch)
            self.known.add(*self._labels(batch))
        if self._settings.require_positive:
            kept = self._labels(batch)[2]["positive"].lengths(batch.num_rows) > 0
            batch = batch if kept.all() else batch.filter(pa.array(kept))
            self.positive.add(*self._labels(batch))
        group, objects, annotated = self._labels(batch)
        lists = self._without_clashes(annotated)
        if self.hiding is not None:
            lists = self.hiding.hide(batch["instance_id"], group, lists)
        self.final.add(group, objects, lists)
        columns = [
            batch["instance_id"],
            batch["image_id"],
            pa.array(objects.astype(np.uint32)),
            batch["box"],
            *(lists[name].to_arrow(batch.num_rows) for name in POLARITIES),
        ]
        return group, pa.RecordBatch.from_arrays(columns, schema=INSTANCE_SCHEMA)

    def _labels(self, batch: pa.RecordBatch) -> tuple[I64, I64, dict[str, Lists]]:
        """Splits, object ids and attribute ids, without those that are deleted."""
        lists = {}
        for name in POLARITIES:
            row, number = Lists.of(batch[name])
            number = self._ids.attributes[number]
            lists[name] = Lists(row, number).where(number >= 0)
        return _numbers(batch, "split"), self._ids.objects[_numbers(batch, "object_id")], lists

    def _without_clashes(self, lists: Mapping[str, Lists]) -> dict[str, Lists]:
        """Make the two lists sorted, free of repeats and disjoint: negative wins a clash.

        Comes after `require_positive`, as in the authors' code, where the reader of the cleaned
        files resolves clashes: an instance whose only positives clash stays, without positives.
        """
        size = max(self._ids.num_attributes, 1)
        positive, negative = (np.unique(one.row * size + one.number) for one in lists.values())
        both = np.isin(positive, negative, assume_unique=True)
        self.clashes += int(both.sum())
        return {
            name: Lists(*np.divmod(keys, size))
            for name, keys in zip(POLARITIES, (positive[~both], negative), strict=True)
        }
