"""Attribute groups and feasible sets of a cleaned dataset (Sec. 2.2).

VAW's own files decide where they are given (`attribute_types.json`, `attribute_parent_types.json`,
`head_tail.json`); a dataset without them gets its own types, or `other`, and a split by frequency.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vlal_dist.errors import DataError
from vlal_dist.method.feasible import FeasibleSets, enlarge_feasible_sets, feasible_sets
from vlal_dist.vocabulary import PREVALENCES, Vocabulary

OTHER = "other"
"""Type of an attribute that no type holds, and of a type that no parent type holds."""

HEAD_SHARE, TAIL_SHARE = 0.47, 0.13
"""Shares of VAW's 591 attributes: 278 head, 235 medium, 78 tail."""


def attribute_types(
    attributes: Sequence[str],
    *,
    types: Mapping[str, Sequence[str]],
    parent_types: Mapping[str, Sequence[str]] | None,
) -> tuple[str, ...]:
    """Type of each attribute; a name that stands in several types belongs to the first.

    Args:
        attributes: names, in vocabulary order.
        types: type -> attribute names, in file order (VAW: sub-types).
        parent_types: parent type -> types, in file order; None: the types themselves.
    """
    parent_of: dict[str, str] = {}
    for parent, members in (parent_types or {name: [name] for name in types}).items():
        for member in members:
            parent_of.setdefault(member, parent)
    type_of: dict[str, str] = {}
    for kind, members in types.items():
        for member in members:
            type_of.setdefault(member, kind)
    return tuple(parent_of.get(type_of.get(name, OTHER), OTHER) for name in attributes)


def listed_prevalence(
    attributes: Sequence[str], head_tail: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Head, medium or tail of each attribute from a list file.

    Args:
        attributes: names, in vocabulary order.
        head_tail: head, medium and tail -> attribute names.

    Raises:
        DataError: another group name, or an attribute that the file does not list.
    """
    if set(head_tail) - set(PREVALENCES):
        raise DataError(
            f"clean.head_tail has the groups {', '.join(head_tail)}; "
            f"allowed are {', '.join(PREVALENCES)}: correct the file"
        )
    found = {name: group for group, members in head_tail.items() for name in members}
    missing = [name for name in attributes if name not in found]
    if missing:
        raise DataError(
            f"clean.head_tail does not list {len(missing)} of {len(attributes)} attributes "
            f"({', '.join(missing[:5])}, ...); add them, or leave clean.head_tail out to group by "
            "training positives"
        )
    return tuple(found[name] for name in attributes)


def prevalence_by_count(
    attributes: Sequence[str], num_positive: Mapping[str, int]
) -> tuple[str, ...]:
    """Head, medium and tail in VAW's shares, by training positives; equals in name order.

    Args:
        attributes: names, in vocabulary order.
        num_positive: attribute -> training instances that have it.
    """
    ranked = sorted(attributes, key=lambda name: (-num_positive.get(name, 0), name))
    num_head, num_tail = round(HEAD_SHARE * len(ranked)), round(TAIL_SHARE * len(ranked))
    head, tail = set(ranked[:num_head]), set(ranked[len(ranked) - num_tail :])
    return tuple(
        "head" if name in head else "tail" if name in tail else "medium" for name in attributes
    )


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
