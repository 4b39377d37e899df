"""From the parts of many samples to the arrays of a batch: labels and likelihoods.

All at once: Python per sample is what loaders spend their time on.

Legend: B samples, A attributes, S values of ragged rows.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from vlal_dist.data.hashing import I64
from vlal_dist.errors import DataError

Data = bytes | memoryview
Ragged = tuple[npt.NDArray[np.float32], I64]
"""Values float32 [S], and indptr int64 [B + 1]."""


def parse_json(parts: Sequence[Data]) -> list[dict[str, Any]]:
    """The `KEY.json` of many samples, in one call of the parser.

    Raises:
        DataError: one of them is no JSON.
    """
    try:
        found: list[dict[str, Any]] = orjson.loads(b"[" + b",".join(parts) + b"]")
    except ValueError as error:
        raise DataError(f"a sample's json cannot be read: {error}; pack again") from None
    return found


def label_rows(samples: Sequence[dict[str, Any]], num_attributes: int) -> npt.NDArray[np.int8]:
    """int8 [B, A]: +1 annotated present, -1 annotated absent, 0 unannotated.

    Raises:
        DataError: an attribute id beyond A.
    """
    label = np.zeros((len(samples), num_attributes), dtype=np.int8)
    lists = [sample["positive"] for sample in samples] + [sample["negative"] for sample in samples]
    counts = [len(one) for one in lists]
    ids = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=sum(counts))
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_attributes:
        raise DataError(f"a sample names attribute {ids.max()} of {num_attributes}; pack again")
    places = np.repeat(np.arange(len(lists)) % len(samples) * num_attributes, counts) + ids
    positives = sum(counts[: len(samples)])
    flat = label.reshape(-1)
    flat[places[:positives]] = 1
    # Negative wins a clash (authors' target builder).
    flat[places[positives:]] = -1
    return label


def join_likelihoods(parts: Sequence[Data]) -> Ragged:
    """The arrays in the `KEY.likelihood.npy` of many samples, one after the other.

    Raises:
        DataError: one of them is no float32 vector.
    """
    values = []
    for part in parts:
        # pack writes one kind of header; reading it as numpy does takes 50 times as long.
        count = (len(part) - _HEADER_BYTES) // 4
        if bytes(part[:_HEADER_BYTES]) == _header(count):
            values.append(np.frombuffer(part, dtype="<f4", offset=_HEADER_BYTES))
            continue
        try:
            array = np.lib.format.read_array(io.BytesIO(bytes(part)), allow_pickle=False)
        except ValueError as error:
            raise DataError(f"a likelihood cannot be read: {error}; merge again") from None
        values.append(array.astype(np.float32, copy=False))
    indptr = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int64)
    return np.concatenate(values) if values else np.zeros(0, np.float32), indptr


_HEADER_BYTES = 128


@lru_cache(maxsize=4096)
def _header(count: int) -> bytes:
    """What numpy writes before a float32 vector of that length."""
    sink = io.BytesIO()
    if count >= 0:
        np.lib.format.write_array(sink, np.zeros(count, "<f4"), version=(1, 0))
    return sink.getvalue()[:_HEADER_BYTES]
