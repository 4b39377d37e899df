"""Dense labels of rendered data: every attribute of every crop, annotated or not.

They never touch training; they let an evaluation judge predictions without annotation.
"""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from vlal_dist.data.format.dataset import Dataset, read_labels
from vlal_dist.data.format.index import ARROW_ERRORS, read_parquet
from vlal_dist.errors import DataError, VlalError, bounded
from vlal_dist.remarks import remark
from vlal_dist.storage.store import read_url
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseLabels:
    """Dense labels of a split.

    Attributes:
        label: int8 [N, A], +1 or -1, row-aligned with the split's index.
        unknown_names: names in the file that the vocabulary lacks, sorted; they are left out.
    """

    label: npt.NDArray[np.int8]
    unknown_names: list[str]


def read_dense_labels(url: str, dataset: Dataset, split: str) -> DenseLabels:
    """Read the Parquet file at `url` and join it to a split by instance id.

    Columns: `instance_id` string, `positive` list<string>. An attribute that is not listed is
    absent. Instances of other splits may be in the file.

    Raises:
        NotFoundError: no such file.
        DataError: other columns, an instance twice or missing, or no name of the vocabulary.
    """
    try:
        table = read_parquet(read_url(url))
        table.validate(full=True)
    except VlalError:
        raise
    except ARROW_ERRORS as error:
        raise DataError(f"truth {url} is no Parquet file: {bounded(str(error))}") from None
    for name, kind in (("instance_id", pa.string()), ("positive", pa.list_(pa.string()))):
        if name not in table.column_names or table[name].type != kind:
            raise DataError(
                f"truth {url}: columns {table.schema.names}; needed are instance_id (string) and "
                "positive (list of strings)"
            )
    instance_id = read_labels(dataset, split)["instance_id"].combine_chunks()
    return join_dense_labels(table, instance_id, vocabulary=dataset.vocabulary, where=url)


def join_dense_labels(
    table: pa.Table, instance_id: pa.StringArray, *, vocabulary: Vocabulary, where: str
) -> DenseLabels:
    """The join of `read_dense_labels`, on tables.

    Args:
        table: `instance_id` string, `positive` list<string>.
        instance_id: of the split's rows, in order.
        vocabulary: attribute names.
        where: name of the table, for errors.
    """
    position = instance_rows(table, instance_id, where=where)
    lists = table["positive"].combine_chunks().take(position)
    names = lists.flatten()
    attribute = pa.compute.index_in(names, value_set=pa.array(vocabulary.attributes, pa.string()))
    row = np.repeat(np.arange(len(lists)), np.asarray(pa.compute.list_value_length(lists)))
    known = np.asarray(attribute.is_valid())
    if len(names) and not known.any():
        raise DataError(f"truth {where}: no name in it, such as {names[0]}, is in the vocabulary")
    unknown = sorted(names.filter(attribute.is_null()).unique().to_pylist())
    if unknown:
        remark(
            logger,
            "evaluation.truth",
            "truth %s: %d names are not in the vocabulary, and left out: %s",
            where,
            len(unknown),
            ", ".join(unknown),
        )
    label = np.full((len(instance_id), len(vocabulary.attributes)), -1, dtype=np.int8)
    label[row[known], np.asarray(attribute.drop_null())] = 1
    return DenseLabels(label=label, unknown_names=unknown)


def instance_rows(table: pa.Table, instance_id: pa.StringArray, *, where: str) -> pa.Int32Array:
    """The row of `table` of each instance.

    Raises:
        DataError: an instance twice or missing.
    """
    found = table["instance_id"].combine_chunks()
    if len(found.unique()) != len(found):
        raise DataError(f"truth {where}: an instance_id comes twice; write each instance once")
    position = pa.compute.index_in(instance_id, value_set=found)
    if position.null_count:
        missing = instance_id.filter(position.is_null())[0].as_py()
        raise DataError(
            f"truth {where} lacks {position.null_count} of {len(instance_id)} instances, first "
            f"{missing!r}; write the labels of every instance of the split"
        )
    return position
