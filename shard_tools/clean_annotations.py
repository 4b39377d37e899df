"""The steps of the cleaning of Sec. 3.1, each a pure function from instances to instances.

The order, and what the authors' notebook counts after each, is in `clean_steps`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from shard_tools.clean_records import Instance, Reject


def keep_large(instances: Sequence[Instance], *, min_side: float) -> list[Instance]:
    """Instances whose box is at least `min_side` pixels wide and high (Sec. 3.1: 50)."""
    return [i for i in instances if i.box[2] >= min_side and i.box[3] >= min_side]


def count_objects(instances: Sequence[Instance]) -> dict[str, int]:
    """Object name -> instances, in order of first appearance."""
    counts: dict[str, int] = {}
    for instance in instances:
        counts[instance.object_name] = counts.get(instance.object_name, 0) + 1
    return counts


def rename_objects(instances: Sequence[Instance], table: Mapping[str, str]) -> list[Instance]:
    """Replace object names that stand in `table`; the others stay."""
    return [
        replace(instance, object_name=table[instance.object_name])
        if instance.object_name in table
        else instance
        for instance in instances
    ]


def delete_attributes(instances: Sequence[Instance], names: Collection[str]) -> list[Instance]:
    """Remove attributes from both lists of every instance; no instance is dropped."""
    deleted = frozenset(names)
    return [
        instance
        if deleted.isdisjoint(instance.positive) and deleted.isdisjoint(instance.negative)
        else replace(
            instance,
            positive=tuple(name for name in instance.positive if name not in deleted),
            negative=tuple(name for name in instance.negative if name not in deleted),
        )
        for instance in instances
    ]


def reject_unknown(
    instances: Sequence[Instance], *, objects: Collection[str], attributes: Collection[str]
) -> tuple[list[Instance], list[Reject]]:
    """Set aside instances with a name outside a given vocabulary.

    Args:
        instances: after merge, renames and deletions.
        objects: known object names (a set or dictionary).
        attributes: known attribute names (a set or dictionary).
    """
    kept, rejects = [], []
    for instance in instances:
        unknown = [n for n in (*instance.positive, *instance.negative) if n not in attributes]
        if instance.object_name not in objects:
            reason, detail = "unknown_object", instance.object_name
        elif unknown:
            reason, detail = "unknown_attribute", ", ".join(dict.fromkeys(unknown))
        else:
            kept.append(instance)
            continue
        rejects.append(Reject(instance.split, instance.instance_id, reason, detail))
    return kept, rejects


def keep_positive(instances: Sequence[Instance]) -> list[Instance]:
    """Instances with at least one attribute in the positive list."""
    return [instance for instance in instances if instance.positive]


def resolve_clashes(instances: Sequence[Instance]) -> tuple[list[Instance], int]:
    """Make the two lists sorted, free of repeats and disjoint: negative wins a clash.

    Comes after `keep_positive`, as in the authors' code, where the reader of the cleaned files
    resolves clashes: an instance whose only positives clash stays, without positives.

    Returns:
        The instances, and how many (instance, attribute) pairs stood in both lists.
    """
    resolved, clashes = [], 0
    for instance in instances:
        positive, negative = set(instance.positive), set(instance.negative)
        clashes += len(positive & negative)
        positive -= negative
        resolved.append(
            replace(instance, positive=tuple(sorted(positive)), negative=tuple(sorted(negative)))
        )
    return resolved, clashes
