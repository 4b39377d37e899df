"""The cleaning of Sec. 3.1 in order, counted after every step as the authors' notebook does.

size filter -> merge of object names -> renames -> deleted attributes -> vocabulary -> instances
without positives -> clashes -> hidden labels. The splits are the annotation files' own.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from shard_tools.clean_annotations import (
    count_objects,
    delete_attributes,
    keep_large,
    keep_positive,
    reject_unknown,
    rename_objects,
    resolve_clashes,
)
from shard_tools.clean_counts import StepCounts, count_instances
from shard_tools.clean_hide import HideRule, count_hidden, hide_labels
from shard_tools.clean_records import Instance, Reject
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

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
