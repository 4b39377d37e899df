"""Groups of attributes that the evaluation averages over: parent types, and head/medium/tail.

VAW's own files decide where they are given (`attribute_types.json`, `attribute_parent_types.json`,
`head_tail.json`); a dataset without them gets its own types, or `other`, and a split by frequency.
"""

from collections.abc import Mapping, Sequence

from vlal_dist.errors import DataError
from vlal_dist.vocabulary import PREVALENCES

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
