"""What each cleaning step leaves, and the first step that departs from the expected counts.

Counts follow the authors' notebook: pairs are distinct (object, attribute) pairs, taken from the
lists as they stand, before a clash is resolved (only `hide` comes after that).
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from shard_tools.clean.records import Instance
from vlal_dist.errors import ConfigError

SPLITS = ("train", "val", "test")

logger = logging.getLogger(__name__)

STEPS = (
    "read",
    "min_side",
    "merge",
    "rename",
    "delete_attributes",
    "known_names",
    "require_positive",
    "hide",
    "feasible",
)
"""Steps in order; `known_names` occurs with `--like` only, `hide` with `clean.hide` only."""


def _count(instances: Sequence[Instance]) -> dict[str, int]:
    positive: dict[str, set[str]] = defaultdict(set)
    annotated: dict[str, set[str]] = defaultdict(set)
    for instance in instances:
        positive[instance.object_name].update(instance.positive)
        annotated[instance.object_name].update(instance.positive, instance.negative)
    return {
        "instances": len(instances),
        "objects": len(positive),
        "attributes": len(set().union(*annotated.values())),
        "positive_attributes": len(set().union(*positive.values())),
        "positive_pairs": sum(map(len, positive.values())),
        "annotated_pairs": sum(map(len, annotated.values())),
        "positive_annotations": sum(len(instance.positive) for instance in instances),
        "negative_annotations": sum(len(instance.negative) for instance in instances),
    }


QUANTITIES = tuple(_count([]))
"""Counted over all splits, and per split as `train_instances` and so on. `attributes` and
`annotated_pairs` take both lists, `positive_...` the positive list alone."""

HIDE_QUANTITIES = ("kept_positives", "hidden_positives", "kept_negatives", "hidden_negatives")
"""Of the step `hide`, besides the others: labels of the training split."""

StepCounts = dict[str, dict[str, int]]


def count_instances(instances: Sequence[Instance]) -> dict[str, int]:
    """All quantities over all splits, then per split that has instances."""
    by_split: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        by_split[instance.split].append(instance)
    counts = _count(instances)
    for split in SPLITS:
        if split in by_split:
            of_split = _count(by_split[split])
            counts.update({f"{split}_{name}": value for name, value in of_split.items()})
    return counts


def check_expected(expected: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse names of steps or counts that do not exist, before any work.

    Raises:
        ConfigError: naming the unknown one and the known ones.
    """
    names = [*QUANTITIES, *(f"{split}_{name}" for split in SPLITS for name in QUANTITIES)]
    for step, values in expected.items():
        if step not in STEPS:
            raise ConfigError(f"clean.expected has the step {step!r}; known are {', '.join(STEPS)}")
        more = HIDE_QUANTITIES if step == "hide" else ()
        known = ("pairs",) if step == "feasible" else (*names, *more)
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"clean.expected.{step} has the count {name!r}; known are {', '.join(known)}"
                )


def first_departure(
    counts: Mapping[str, Mapping[str, int]], expected: Mapping[str, Mapping[str, int]]
) -> str | None:
    """Name the first step whose counts are not the expected ones.

    Returns:
        `merge: objects 1764 instead of 1765`, or None when all agree. A step that did not run
        departs; a count of a split without instances is 0.
    """
    for step in STEPS:
        if step not in counts and expected.get(step):
            return f"{step}: this step did not run"
        found = counts.get(step, {})
        wrong = [
            f"{name} {found.get(name, 0)} instead of {value}"
            for name, value in expected.get(step, {}).items()
            if found.get(name, 0) != value
        ]
        if wrong:
            return f"{step}: {', '.join(wrong)}"
    return None


def say_labels(instances: Sequence[Instance], splits: Sequence[str]) -> None:
    """Log the labels of each split, and warn of splits on which no attribute can be evaluated.

    Args:
        instances: the cleaned ones.
        splits: names, in order.
    """
    one_sided = []
    for split in splits:
        of_split = [instance for instance in instances if instance.split == split]
        lists = {
            kind: Counter(name for i in of_split for name in getattr(i, kind))
            for kind in ("positive", "negative")
        }
        both = len(lists["positive"].keys() & lists["negative"].keys())
        numbers = ", ".join(f"{counts.total()} {kind}" for kind, counts in lists.items())
        logger.info(
            "%s: %d instances, labels: %s; attributes with both: %d",
            split,
            len(of_split),
            numbers,
            both,
        )
        if not of_split:
            logger.warning("%s: no instance is left in this split", split)
        elif not both:
            one_sided.append(f"{split} ({numbers})")
    if one_sided:
        logger.warning(
            "no attribute has both positive and negative labels in %s: average precision is "
            "undefined there, and so is mAP; annotate both, or count what is unannotated as absent "
            "(evaluation.unannotated: negative)",
            ", ".join(one_sided),
        )
