"""The cleaning steps of Sec. 3.1: pure functions from instances to instances, counted in order.

The order, and what the authors' notebook counts after each, is in `clean_steps`.

size filter -> merge of object names -> renames -> deleted attributes -> vocabulary -> instances
without positives -> clashes -> hidden labels. The splits are the annotation files' own.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from shard_tools.clean.counts import StepCounts, count_instances
from shard_tools.clean.hide import HideRule, count_hidden, hide_labels
from shard_tools.clean.records import Instance, Reject
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


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


MergeRule = Callable[[Mapping[str, int]], dict[str, str]]
"""Instances per object name, in order of first appearance -> name -> representative."""


@dataclass(frozen=True)
class Cleaned:
    """What the steps leave.

    Attributes:
        instances: final, in reading order, with sorted and disjoint lists.
        objects: sorted object names (of all instances before `require_positive`).
        attributes: sorted attribute names (as `objects`, over both lists).
        merges: object name -> representative, for the names that the merge changed.
        rejects: instances with a name outside the given vocabulary.
        counts: step -> counts.
        clashes: (instance, attribute) pairs that stood in both lists.
        hidden: training instances with the labels hidden of them; None: there was nothing to hide.
    """

    instances: list[Instance]
    objects: tuple[str, ...]
    attributes: tuple[str, ...]
    merges: dict[str, str]
    rejects: list[Reject]
    counts: StepCounts
    clashes: int
    hidden: list[Instance] | None = None


def clean_instances(
    instances: Sequence[Instance],
    *,
    min_side: float,
    merge: MergeRule,
    renames: Mapping[str, str],
    deleted_attributes: Sequence[str],
    known: Vocabulary | None,
    require_positive: bool,
    hide: HideRule | None = None,
) -> Cleaned:
    """Run the steps.

    Args:
        instances: in reading order, which the merge depends on.
        min_side: smallest box width and height kept, pixels.
        merge: gives the merge table.
        renames: object name -> name, applied after the merge.
        deleted_attributes: names removed everywhere.
        known: the vocabulary to keep to; None: one is made from the names left.
        require_positive: drop instances without a positive.
        hide: training labels that are hidden; the vocabulary keeps their names.
    """
    counts: StepCounts = {}

    def counted(step: str, left: list[Instance]) -> list[Instance]:
        counts[step] = count_instances(left)
        shown = ("instances", "objects", "attributes", "positive_pairs")
        logger.info("%s: %s", step, ", ".join(f"{counts[step][name]} {name}" for name in shown))
        return left

    left = counted("read", list(instances))
    left = counted("min_side", keep_large(left, min_side=min_side))
    num_instances = count_objects(left)
    table = merge(num_instances)
    merges = {name: table[name] for name in sorted(num_instances) if table.get(name, name) != name}
    left = counted("merge", rename_objects(left, merges))
    left = counted("rename", rename_objects(left, renames))
    left = counted("delete_attributes", delete_attributes(left, deleted_attributes))
    rejects: list[Reject] = []
    if known is not None:
        left, rejects = reject_unknown(
            left, objects=known.object_ids, attributes=known.attribute_ids
        )
        left = counted("known_names", left)
    objects = sorted({instance.object_name for instance in left})
    attributes = sorted({n for i in left for n in (*i.positive, *i.negative)})
    if require_positive:
        left = counted("require_positive", keep_positive(left))
    final, clashes = resolve_clashes(left)
    cleaned = Cleaned(
        instances=final,
        objects=tuple(objects),
        attributes=tuple(attributes),
        merges=merges,
        rejects=rejects,
        counts=counts,
        clashes=clashes,
    )
    return cleaned if hide is None else _hide(cleaned, hide)


def _hide(cleaned: Cleaned, rule: HideRule) -> Cleaned:
    """The last step, so that what an instance keeps is drawn and counted in labels that stand."""
    kept, hidden = hide_labels(cleaned.instances, rule)
    counts = {**count_instances(kept), **count_hidden(kept, hidden)}
    return replace(
        cleaned, instances=kept, hidden=hidden, counts={**cleaned.counts, "hide": counts}
    )
