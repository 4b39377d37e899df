"""Ignored pairs against hidden truth: how many of the pairs that a draw ignored are present.

The truth is complete (rendered data), or the labels that clean put aside (`clean.hide`): then only
pairs that an annotator judged are known. Neither is used in training.

Shapes: N crops, A attributes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from vlal_dist.data.format.dataset import Dataset, read_labels
from vlal_dist.data.format.index import read_parquet
from vlal_dist.errors import DataError
from vlal_dist.evaluation.dense_labels import instance_rows, join_dense_labels
from vlal_dist.evaluation.predictions import label_matrix
from vlal_dist.storage.store import read_url

Labels = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HiddenCount:
    """Unannotated feasible pairs of all crops; elsewhere a draw has no effect on the loss.

    Attributes:
        crops: N.
        ignored: pairs that were ignored.
        known: those of them whose truth is known.
        positive: those of the known that are present.
        hidden: pairs that are present, ignored or not.
    """

    crops: int
    ignored: int
    known: int
    positive: int
    hidden: int

    @property
    def positive_share(self) -> float:
        """Of the ignored pairs whose truth is known, the share present; NaN of none."""
        return _share(self.positive, self.known)

    @property
    def hidden_share(self) -> float:
        """Of the pairs that are present, the share ignored; NaN of none."""
        return _share(self.positive, self.hidden)

    @property
    def known_share(self) -> float:
        """Of the ignored pairs, the share whose truth is known; NaN of none."""
        return _share(self.known, self.ignored)

    @property
    def per_crop(self) -> float:
        """Ignored pairs per crop, the effective number; NaN without crops."""
        return _share(self.ignored, self.crops)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def count_hidden_truth(drawn: Mask, *, feasible: Mask, label: Labels, truth: Labels) -> HiddenCount:
    """Count one draw against the truth.

    Args:
        drawn: bool [N, A], Omega_Ignore of each crop; `feasible` itself gives chance.
        feasible: bool [N, A], Omega_o.
        label: int8 [N, A], +1 annotated present, -1 annotated absent, 0 unannotated.
        truth: int8 [N, A], +1 present, -1 absent, 0 not known; not read where `label` is not 0.
    """
    unannotated = feasible & (label == 0)
    ignored = drawn & unannotated
    return HiddenCount(
        crops=len(label),
        ignored=int(ignored.sum()),
        known=int((ignored & (truth != 0)).sum()),
        positive=int((ignored & (truth == 1)).sum()),
        hidden=int((unannotated & (truth == 1)).sum()),
    )


def read_hidden_truth(url: str, dataset: Dataset, split: str) -> Labels:
    """Read the known truth of a split's pairs, int8 [N, A]: +1 present, -1 absent, 0 not known.

    The Parquet file at `url` has the column `instance_id` string, and either `positive`
    list<string>, complete labels by name; or `positive` and `negative` list<uint32>, the labels
    that clean hid, by id. Instances of other splits may be in it.

    Raises:
        NotFoundError: no such file.
        DataError: other columns, an instance twice or missing, or hidden labels that are annotated
            in the dataset or beyond its vocabulary.
    """
    rows = read_labels(dataset, split)
    instance_id = rows["instance_id"].combine_chunks()
    try:
        table = read_parquet(read_url(url))
    except pa.ArrowInvalid as error:
        raise DataError(f"truth {url} is not a Parquet file: {error}") from None
    types = {name: table[name].type for name in table.column_names}
    ids = pa.list_(pa.uint32())
    if types.get("instance_id") == pa.string():
        if types.get("positive") == pa.list_(pa.string()):
            return join_dense_labels(
                table, instance_id, vocabulary=dataset.vocabulary, where=url
            ).label
        if types.get("positive") == types.get("negative") == ids:
            label = _dense(rows, len(dataset.vocabulary.attributes), where=dataset.url)
            return join_hidden(table, instance_id, label=label, where=url)
    raise DataError(
        f"truth {url}: columns {table.schema.names}; needed are instance_id (string) and positive "
        "(list of strings), or the positive and negative (lists of uint32) that clean.hide writes"
    )


def join_hidden(
    table: pa.Table, instance_id: pa.StringArray, *, label: Labels, where: str
) -> Labels:
    """Hidden labels as rows of a split: int8 [N, A], 0 where none was hidden.

    Args:
        table: `instance_id` string, `positive` and `negative` list<uint32>.
        instance_id: of the split's rows, in order.
        label: int8 [N, A], the annotations that were left.
        where: name of the table, for errors.

    Raises:
        DataError: an instance twice or missing, an id beyond A, or a label that is annotated as
            well, so that the file is of another dataset.
    """
    position = instance_rows(table, instance_id, where=where)
    hidden = _dense(table.take(position), label.shape[1], where=where)
    both = int(((hidden != 0) & (label != 0)).sum())
    if both:
        raise DataError(
            f"truth {where}: {both} of its labels are annotated in the dataset too; give the file "
            "that the clean run of this dataset wrote"
        )
    return hidden


def _dense(table: pa.Table, num_attributes: int, *, where: str) -> Labels:
    """Columns `positive` and `negative` (lists of ids) as int8 [N, A]."""
    ids = pa.concat_arrays(
        [table[name].combine_chunks().flatten() for name in ("positive", "negative")]
    )
    largest = pa.compute.max(ids).as_py() or 0
    if largest >= num_attributes:
        raise DataError(
            f"{where}: attribute {largest} of {num_attributes}; give the file that the clean run "
            "of this dataset wrote"
        )
    return label_matrix(table["positive"], table["negative"], width=num_attributes)
