"""Photo of each row of a split, from the samples' `KEY.json` or the annotations beside tars."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from vlal_dist.data.format.dataset import Split
from vlal_dist.errors import DataError

READS = 16
"""Ranged reads in flight."""


def image_numbers(split: Split) -> npt.NDArray[np.int64]:
    """The photo of each row, as dense numbers in the order of their first row.

    Only the json member of each sample is read. The crc32, which covers whole samples, is not
    checked, but the member must name the object that the index does.

    Returns:
        int64 [N], 0 .. number of photos - 1.

    Raises:
        DataError: a member is not what pack wrote.
        StorageError: a shard cannot be read.
    """
    index = split.index
    columns = (index.shard, index.offset, index.json_offset, index.json_length, index.object_id)
    rows = list(zip(*(np.asarray(column).tolist() for column in columns), strict=True))

    def photo(row: int) -> str:
        shard, sample, offset, length, object_id = rows[row]
        data = split.store.read(split.shard_key(shard), offset=sample + offset, length=length)
        try:
            meta = json.loads(data)
            if meta["object_id"] == object_id:
                return str(meta["image_id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise DataError(
            f"{split.store.url}/{split.shard_key(shard)}: the json of sample row {row} is not what "
            "was packed; run vlal verify, and restore the shard or pack again"
        )

    if split.annotations is not None:
        photos = split.annotations.texts("image_id")
    else:
        with ThreadPoolExecutor(READS) as pool:
            photos = list(pool.map(photo, range(len(rows))))
    number = {name: place for place, name in enumerate(dict.fromkeys(photos))}
    return np.fromiter((number[name] for name in photos), dtype=np.int64, count=len(photos))
