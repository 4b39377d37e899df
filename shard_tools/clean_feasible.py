"""Feasible sets of a cleaned dataset (Sec. 2.2), plain or enlarged by similar objects."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vlal_dist.errors import DataError
from vlal_dist.method.feasible import FeasibleSets, enlarge_feasible_sets, feasible_sets
from vlal_dist.vocabulary import Vocabulary

VECTORS = "object_vectors"
"""Tensor in the file: float32 [O, D], CLIP text vectors, rows in object id order."""


def build_feasible_sets(tables: Sequence[pa.Table], *, num_objects: int) -> FeasibleSets:
    """Omega_o from co-occurrence.

    Args:
        tables: rows of the splits that define feasibility (`clean_files.instances_table`).
        num_objects: O.
    """
    table = pa.concat_tables(tables)
    positive, negative = (table[name].combine_chunks() for name in ("positive", "negative"))
    return feasible_sets(
        object_id=table["object_id"].to_numpy(),
        positive_indptr=positive.offsets.to_numpy(),
        positive=positive.values.to_numpy(),
        negative_indptr=negative.offsets.to_numpy(),
        negative=negative.values.to_numpy(),
        num_objects=num_objects,
    )


def enlarge(
    feasible: FeasibleSets, *, path: str, vocabulary: Vocabulary, top_k: int, votes: int
) -> FeasibleSets:
    """The sets with what similar objects add (authors' configuration kn-KT).

    Args:
        feasible: sets from co-occurrence.
        path: object vectors, safetensors.
        vocabulary: the objects that the vectors must be of.
        top_k: neighbours per list.
        votes: votes that admit an attribute.

    Raises:
        DataError: the file is absent, damaged, or of another vocabulary.
    """
    vectors = _read_vectors(path, vocabulary)
    return enlarge_feasible_sets(feasible, object_vectors=vectors, top_k=top_k, votes=votes)


def _read_vectors(path: str, vocabulary: Vocabulary) -> NDArray[np.float32]:
    remedy = "write it again for the present vocabulary"
    try:
        with safe_open(path, framework="numpy") as file:
            digest = (file.metadata() or {}).get("vocabulary_digest")
            vectors: NDArray[np.float32] = file.get_tensor(VECTORS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"clean.object_vectors: {path}: {error}; {remedy}") from None
    if digest != vocabulary.digest:
        raise DataError(
            f"clean.object_vectors: {path} is of vocabulary {digest}, the cleaned one is "
            f"{vocabulary.digest}; {remedy}"
        )
    return vectors
