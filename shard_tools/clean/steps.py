"""The cleaning steps of Sec. 3.1: pure functions from instances to instances, counted in order.

Size filter -> merge of object names -> renames -> deleted attributes -> vocabulary -> instances
without positives -> clashes -> hidden labels. The splits are the annotation files' own.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from shard_tools.clean.counts import StepCounts, count_instances
from shard_tools.clean.hide import count_hidden, hide_labels
from shard_tools.clean.names import matching
from shard_tools.clean.records import Instance, Reject, shortened
from shard_tools.clean.wordnet import WordNet, merge_table
from vlal_dist.config.sections import CleanConfig
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def attribute_names(instances: Sequence[Instance]) -> set[str]:
    """All names in the positive and negative lists."""
    return {name for i in instances for name in (*i.positive, *i.negative)}


def rename_objects(instances: Sequence[Instance], table: Mapping[str, str]) -> list[Instance]:
    """Replace object names that stand in `table`; the others stay."""
    return [replace(i, object_name=table.get(i.object_name, i.object_name)) for i in instances]


def delete_attributes(instances: Sequence[Instance], names: Collection[str]) -> list[Instance]:
    """Remove attributes from both lists of every instance; no instance is dropped."""
    deleted = frozenset(names)
    return [
        replace(
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
            reason, detail = "unknown_object", shortened(instance.object_name)
        elif unknown:
            names = ", ".join(dict.fromkeys(unknown))
            reason, detail = "unknown_attribute", shortened(names, 1000)
        else:
            kept.append(instance)
            continue
        rejects.append(Reject(instance.split, instance.instance_id, reason, detail))
    return kept, rejects


def resolve_clashes(instances: Sequence[Instance]) -> tuple[list[Instance], int]:
    """Make the two lists sorted, free of repeats and disjoint: negative wins a clash.

    Comes after `require_positive`, as in the authors' code, where the reader of the cleaned files
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


@dataclass(frozen=True)
class Cleaned:
    """Result of the steps.

    Attributes:
        instances: final, in reading order, with sorted and disjoint lists.
        objects: sorted object names (of all instances before `require_positive`).
        attributes: sorted attribute names (as `objects`, over both lists).
        merges: object name -> representative, for the names that the merge changed.
        rejects: instances with a name outside the given vocabulary.
        counts: step -> counts.
        clashes: (instance, attribute) pairs that stood in both lists.
        hidden: training instances with their hidden labels; None: the step `hide` did not run.
    """

    instances: list[Instance]
    objects: tuple[str, ...]
    attributes: tuple[str, ...]
    merges: dict[str, str]
    rejects: list[Reject]
    counts: StepCounts
    clashes: int
    hidden: list[Instance] | None


def clean_instances(
    instances: Sequence[Instance],
    settings: CleanConfig,
    *,
    merge: Mapping[str, str] | WordNet,
    known: Vocabulary | None = None,
) -> Cleaned:
    """Run the steps.

    Args:
        instances: in reading order, which the merge depends on.
        settings: what each step does.
        merge: name -> representative, or the dictionary that decides which names are similar.
        known: the vocabulary to keep to; None: one is made from the names left.
    """
    counts: StepCounts = {}

    def counted(step: str, left: list[Instance]) -> list[Instance]:
        counts[step] = count_instances(left)
        shown = ("instances", "objects", "attributes", "positive_pairs")
        logger.info("%s: %s", step, ", ".join(f"{counts[step][name]} {name}" for name in shown))
        return left

    left = counted("read", list(instances))
    left = counted("min_side", [i for i in left if min(i.box[2:]) >= settings.min_side])
    num_instances = Counter(instance.object_name for instance in left)  # first appearance first
    table = merge if isinstance(merge, Mapping) else merge_table(num_instances, merge)
    merges = {name: table[name] for name in sorted(num_instances) if table.get(name, name) != name}
    left = counted("merge", rename_objects(left, merges))
    left = counted("rename", rename_objects(left, settings.renames))
    deleted = matching(attribute_names(left), settings.deleted_attributes)
    left = counted("delete_attributes", delete_attributes(left, deleted))
    rejects: list[Reject] = []
    if known is not None:
        left, rejects = reject_unknown(
            left, objects=known.object_ids, attributes=known.attribute_ids
        )
        left = counted("known_names", left)
    objects = tuple(sorted({instance.object_name for instance in left}))
    attributes = tuple(sorted(attribute_names(left)))
    if settings.require_positive:
        left = counted("require_positive", [i for i in left if i.positive])
    left, clashes = resolve_clashes(left)
    hidden: list[Instance] | None = None
    # The last step, so that what an instance keeps is drawn and counted in the final labels.
    if settings.hide != "none":
        left, hidden = hide_labels(left, seed=settings.hide_seed)
        counts["hide"] = {**count_instances(left), **count_hidden(left, hidden)}
    return Cleaned(left, objects, attributes, merges, rejects, counts, clashes, hidden)
