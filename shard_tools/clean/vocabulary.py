"""Vocabulary with attribute groups, and feasible sets, of cleaned instances (Sec. 2.2).

VAW's own files decide where they are given (`attribute_types.json`, `attribute_parent_types.json`,
`head_tail.json`); a dataset without them gets its own types, or `other`, and a split by frequency.
"""

from collections.abc import Collection, Mapping, Sequence

from safetensors import SafetensorError, safe_open

from shard_tools.clean.columns import SPLITS
from shard_tools.clean.counts import POLARITIES, Tally
from shard_tools.clean.files import read_name_lists
from shard_tools.clean.names import listed, warn_of_unused_names
from shard_tools.clean.steps import Cleaned
from vlal_dist.config.sections import CleanConfig
from vlal_dist.errors import DataError
from vlal_dist.method.feasible import FeasibleSets, enlarge_feasible_sets, feasible_from_pairs
from vlal_dist.vocabulary import OBJECT_VECTORS, PREVALENCES, Vocabulary

OTHER = "other"
"""Type of an attribute that no type holds, and of a type that no parent type holds."""

HEAD_SHARE, TAIL_SHARE = 0.47, 0.13
"""Shares of VAW's 591 attributes: 278 head, 235 medium, 78 tail."""


def make_vocabulary(
    cleaned: Cleaned, settings: CleanConfig, *, annotated: Collection[str]
) -> Vocabulary:
    """Names of a cleaned dataset, with the group of each attribute.

    Args:
        cleaned: result of the steps.
        settings: the group files.
        annotated: attribute names in the annotations, those included that a step removed.

    Raises:
        DataError: a group file is absent, of another form, or lacks attributes.
    """
    attributes = cleaned.attributes
    files = {
        name: read_name_lists(url, setting=f"clean.{name}")
        for name in ("head_tail", "attribute_types", "attribute_parent_types")
        if (url := getattr(settings, name)) is not None
    }
    types = files.get("attribute_types", {})
    for name, groups in files.items():
        parents = name == "attribute_parent_types"
        warn_of_unused_names(
            [member for members in groups.values() for member in members],
            types if parents else annotated,
            setting=f"clean.{name}",
            kind="type of clean.attribute_types" if parents else "attribute of the annotations",
            follows="they group nothing",
        )
    if "head_tail" in files:
        prevalence = listed_prevalence(attributes, files["head_tail"])
    else:
        numbers = cleaned.tally.attributes([SPLITS.index("train")])["positive"].tolist()
        num_positive = dict(zip(attributes, numbers, strict=True))
        prevalence = prevalence_by_count(attributes, num_positive)
    return Vocabulary(
        objects=cleaned.objects,
        attributes=attributes,
        attribute_type=attribute_types(
            attributes, types=types, parent_types=files.get("attribute_parent_types")
        ),
        prevalence=prevalence,
    )


def make_feasible(tally: Tally, vocabulary: Vocabulary, settings: CleanConfig) -> FeasibleSets:
    """Omega_o of each object: from co-occurrence, enlarged by those of similar objects if set.

    Args:
        tally: of the cleaned rows.
        vocabulary: names.
        settings: the splits that define feasibility, and how sets are enlarged.

    Raises:
        DataError: the file of object vectors is absent, damaged, or of another vocabulary.
    """
    splits = [SPLITS.index(split) for split in dict.fromkeys(settings.feasible_splits)]
    positive, negative = (tally.pairs(polarity, splits) for polarity in POLARITIES)
    feasible = feasible_from_pairs(
        positive,
        negative,
        num_objects=len(vocabulary.objects),
        num_attributes=len(vocabulary.attributes),
    )
    path = settings.object_vectors
    if settings.feasible_top_k == 0 or path is None:
        return feasible
    remedy = "write it again for the present vocabulary"
    try:
        with safe_open(path, framework="numpy") as file:
            digest = (file.metadata() or {}).get("vocabulary_digest")
            vectors = file.get_tensor(OBJECT_VECTORS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"clean.object_vectors: {path}: {error}; {remedy}") from None
    if digest != vocabulary.digest:
        raise DataError(
            f"clean.object_vectors: {path} is of vocabulary {digest}, the cleaned one is "
            f"{vocabulary.digest}; {remedy}"
        )
    return enlarge_feasible_sets(
        feasible,
        object_vectors=vectors,
        top_k=settings.feasible_top_k,
        votes=settings.feasible_votes,
    )


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
    type_of, parent_of = (
        # Backwards, so that the first group with a name wins.
        {name: group for group, names in reversed(list(groups.items())) for name in names}
        for groups in (types, parent_types or {name: [name] for name in types})
    )
    return tuple(parent_of.get(type_of.get(name, OTHER), OTHER) for name in attributes)


def listed_prevalence(
    attributes: Sequence[str], head_tail: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Head, medium or tail of each attribute from a list file.

    Args:
        attributes: names, in vocabulary order.
        head_tail: head, medium and tail -> attribute names.

    Raises:
        DataError: another group name, or an attribute that the file does not list or lists twice.
    """
    if set(head_tail) - set(PREVALENCES):
        raise DataError(
            f"clean.head_tail has the groups {listed(head_tail)}; "
            f"allowed are {', '.join(PREVALENCES)}: correct the file"
        )
    found: dict[str, str] = {}
    for group, members in head_tail.items():
        for name in members:
            if found.setdefault(name, group) != group:
                raise DataError(
                    f"clean.head_tail lists {listed([name])} in {found[name]} and in {group}; "
                    "leave it in one of them"
                )
    missing = [name for name in attributes if name not in found]
    if missing:
        raise DataError(
            f"clean.head_tail does not list {len(missing)} of {len(attributes)} attributes "
            f"({listed(missing)}); add them, or leave clean.head_tail out to group by "
            "training positives"
        )
    return tuple(found[name] for name in attributes)


def prevalence_by_count(
    attributes: Sequence[str], num_positive: Mapping[str, int]
) -> tuple[str, ...]:
    """Head, medium and tail in VAW's shares, by training positives; ties in name order.

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
