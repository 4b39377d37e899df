"""Sampling rates from keys and labels: a subset by keys, repeat factors for tail attributes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlal_dist.errors import ConfigError

_NAMED = 5


def subset_factors(keys: Sequence[pa.ChunkedArray], wanted: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which samples of several splits are on a list of keys: bool [N].

    Args:
        keys: keys of each split's samples, row-aligned.
        wanted: the list; a key that several splits hold takes all of them.

    Raises:
        ConfigError: a key on the list that no split holds, or an empty list.
    """
    listed = pa.array(sorted(set(wanted)), pa.string())
    # The list is short and the keys are many: test each key against the list.
    listed_here = [pc.is_in(one, value_set=listed) for one in keys]
    found = pa.chunked_array(
        [c for one, here in zip(keys, listed_here, strict=True) for c in one.filter(here).chunks],
        pa.string(),
    )
    unknown = listed.filter(pc.invert(pc.is_in(listed, value_set=found.combine_chunks())))
    if len(unknown) or not len(listed):
        named = ", ".join(unknown.slice(0, _NAMED).to_pylist())
        raise ConfigError(
            f"data.subset: {len(unknown)} of {len(listed)} keys are of no sample of the training "
            f"split ({named or 'the list is empty'}); list keys as labels.parquet has them"
        )
    return np.concatenate([here.to_numpy() for here in listed_here]).astype(np.bool_)


def repeat_factors(
    positive: Sequence[pa.ChunkedArray], kept: npt.NDArray[np.bool_], *, threshold: float
) -> npt.NDArray[np.float64]:
    """max(1, max over a sample's positives of sqrt(t / f)): float64 [N] (LVIS, Gupta et al. 2019).

    f is the share of the kept samples that carry the attribute.

    Args:
        positive: positive attribute ids of each split's samples (lists), row-aligned.
        kept: bool [N], which samples are trained on at all.
        threshold: t; attributes with f >= t repeat nothing.
    """
    lists = pa.chunked_array([chunk for one in positive for chunk in one.chunks])
    lengths = pc.list_value_length(lists).to_numpy()
    row = np.repeat(np.arange(len(lists), dtype=np.int64), lengths)
    ids = pc.list_flatten(lists).to_numpy().astype(np.int64)
    counted = ids[kept[row]]
    share = np.bincount(counted, minlength=int(ids.max(initial=0)) + 1) / max(1, int(kept.sum()))
    factor = np.ones(len(lists), dtype=np.float64)
    with np.errstate(divide="ignore"):
        wanted = np.sqrt(threshold / share)
    np.maximum.at(factor, row, np.where(share[ids] > 0, wanted[ids], 1.0))
    return np.maximum(factor, 1.0)
