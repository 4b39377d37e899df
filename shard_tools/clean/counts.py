"""What each cleaning step leaves, and the first step that departs from the expected counts.

Counts follow the authors' notebook: pairs are distinct (object, attribute) pairs, taken from the
lists as they stand, before a clash is resolved (only `hide` comes after that). They come from a
`Tally`, which steps that only change names transform without looking at a row.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shard_tools.clean.columns import I64, SPLITS, Lists
from vlal_dist.errors import ConfigError
from vlal_dist.remarks import remark

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


POLARITIES = ("positive", "negative")

Summed = tuple[I64, I64]
"""Distinct keys, ascending, and the number of each."""


@dataclass(frozen=True)
class Tally:
    """Numbers of instances and labels, by group (a split), object and attribute.

    Attributes:
        instances: int64 [G, O].
        labels: polarity -> keys `(group * O + object) * A + attribute` of its labels, and the
            number of each.
        num_attributes: A.
    """

    instances: I64
    labels: Mapping[str, Summed]
    num_attributes: int

    @classmethod
    def zero(cls, groups: int, num_objects: int, num_attributes: int) -> "Tally":
        """No instance."""
        empty = np.zeros(0, np.int64)
        return cls(
            np.zeros((groups, num_objects), np.int64),
            dict.fromkeys(POLARITIES, (empty, empty)),
            num_attributes,
        )

    def mapped(
        self, *, groups: I64 | None = None, objects: I64 | None = None, names: I64 | None = None
    ) -> "Tally":
        """The tally after a change of names.

        Args:
            groups: [G], group -> group; None: no change. -1: these are left out.
            objects: [O], in the same way.
            names: [A], attributes in the same way.
        """
        num_groups, num_objects = self.instances.shape
        groups = np.arange(num_groups) if groups is None else groups
        objects = np.arange(num_objects) if objects is None else objects
        names = np.arange(self.num_attributes) if names is None else names
        instances = np.zeros_like(self.instances)
        of_group, of_object = np.nonzero(self.instances)
        kept = (groups[of_group] >= 0) & (objects[of_object] >= 0)
        of_group, of_object = of_group[kept], of_object[kept]
        np.add.at(
            instances,
            (groups[of_group], objects[of_object]),
            self.instances[of_group, of_object],
        )
        labels = {}
        for polarity, (keys, counts) in self.labels.items():
            rest, name = np.divmod(keys, max(self.num_attributes, 1))
            group, kind = np.divmod(rest, max(num_objects, 1))
            group, kind, name = groups[group], objects[kind], names[name]
            kept = (group >= 0) & (kind >= 0) & (name >= 0)
            new = (group * num_objects + kind) * self.num_attributes + name
            labels[polarity] = summed(new[kept], counts[kept])
        return Tally(instances, labels, self.num_attributes)

    def pairs(self, polarity: str, groups: Sequence[int] | None = None) -> Summed:
        """Distinct `object * A + attribute` of some groups (None: all), with their numbers."""
        keys, counts = self.labels[polarity]
        size = self.instances.shape[1] * self.num_attributes
        if groups is None:
            return summed(keys % max(size, 1), counts)
        parts = []
        for group in groups:
            start, stop = np.searchsorted(keys, [group * size, (group + 1) * size])
            parts.append((keys[start:stop] - group * size, counts[start:stop]))
        if len(parts) == 1:
            return parts[0]
        return summed(*(np.concatenate(some) for some in zip(*parts, strict=True)))

    def objects(self) -> I64:
        """Objects with an instance."""
        return np.flatnonzero(self.instances.any(axis=0))

    def attributes(self, groups: Sequence[int] | None = None) -> dict[str, I64]:
        """Polarity -> int64 [A], labels of each attribute."""
        found = {}
        for polarity in POLARITIES:
            keys, counts = self.pairs(polarity, groups)
            numbers = np.zeros(self.num_attributes, np.int64)
            np.add.at(numbers, keys % max(self.num_attributes, 1), counts)
            found[polarity] = numbers
        return found

    def counts(self) -> dict[str, int]:
        """All quantities over all splits, then per split that has instances."""
        found = self._quantities(None)
        for place, split in enumerate(SPLITS):
            if self.instances[place].any():
                of_split = self._quantities([place])
                found.update({f"{split}_{name}": value for name, value in of_split.items()})
        return found

    def _quantities(self, groups: list[int] | None) -> dict[str, int]:
        instances = self.instances if groups is None else self.instances[groups]
        pairs = [self.pairs(polarity, groups) for polarity in POLARITIES]
        (positive, positives), (negative, negatives) = pairs
        annotated, divisor = np.union1d(positive, negative), max(self.num_attributes, 1)
        return {
            "instances": int(instances.sum()),
            "objects": int(np.count_nonzero(instances.any(axis=0))),
            "attributes": len(np.unique(annotated % divisor)),
            "positive_attributes": len(np.unique(positive % divisor)),
            "positive_pairs": len(positive),
            "annotated_pairs": len(annotated),
            "positive_annotations": int(positives.sum()),
            "negative_annotations": int(negatives.sum()),
        }


def summed(keys: I64, counts: I64) -> Summed:
    """Distinct keys, ascending, with the sums of their numbers."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1)) if len(keys) else order
    return keys[starts], np.add.reduceat(counts, starts) if len(keys) else counts


class Counting:
    """A `Tally` in the making.

    Args:
        groups, num_objects, num_attributes: its numbers G, O and A.
    """

    COMPACTED = 1 << 20
    """Keys that wait before they are summed."""

    def __init__(self, groups: int, num_objects: int, num_attributes: int) -> None:
        self._tally = Tally.zero(groups, num_objects, num_attributes)
        self._waiting: dict[str, list[Summed]] = {polarity: [] for polarity in POLARITIES}
        self._keys = 0

    def add(self, group: I64, objects: I64, lists: Mapping[str, Lists]) -> None:
        """Count some instances.

        Args:
            group: [n].
            objects: [n].
            lists: polarity -> attributes of each instance.
        """
        num_objects = self._tally.instances.shape[1]
        place = group * num_objects + objects
        found, counts = np.unique(place, return_counts=True)
        self._tally.instances.ravel()[found] += counts
        for polarity, numbers in lists.items():
            keys = place[numbers.row] * self._tally.num_attributes + numbers.number
            self._waiting[polarity].append(np.unique(keys, return_counts=True))
            self._keys += len(self._waiting[polarity][-1][0])
        if self._keys > self.COMPACTED:
            self._compact()

    def _compact(self) -> None:
        for parts in self._waiting.values():
            if len(parts) > 1:
                keys, counts = (np.concatenate(some) for some in zip(*parts, strict=True))
                parts[:] = [summed(keys, counts)]
        # Twice what is distinct, so that the work stays linear.
        self._keys = -sum(len(parts[0][0]) for parts in self._waiting.values() if parts)

    def tally(self) -> Tally:
        """What was counted."""
        self._compact()
        labels = {name: parts[0] for name, parts in self._waiting.items() if parts}
        zero = self._tally
        return Tally(zero.instances, {**zero.labels, **labels}, zero.num_attributes)


QUANTITIES = tuple(Tally.zero(len(SPLITS), 0, 0).counts())
"""Counted over all splits, and per split as `train_instances` and so on. `attributes` and
`annotated_pairs` take both lists, `positive_...` the positive list alone."""

HIDE_QUANTITIES = ("kept_positives", "hidden_positives", "kept_negatives", "hidden_negatives")
"""Of the step `hide`, besides the others: labels of the training split."""

StepCounts = dict[str, dict[str, int]]


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


LARGE_LOSS = 0.2
"""Share of a split's instances of which a step that drops more is remarked on."""

_DROPPING = {
    "min_side": ("clean.min_side", "lower it to keep instances with small boxes"),
    "known_names": (
        "--like",
        "their names are not those of that dataset (rejects.parquet lists them): give them its "
        "names by clean.renames, or clean without --like",
    ),
    "require_positive": (
        "clean.require_positive",
        "set it false to keep instances that have only negatives",
    ),
}
"""Steps that drop instances -> their setting, and what to do."""


def remark_on_losses(counts: StepCounts) -> None:
    """Remark on steps that drop more than `LARGE_LOSS` of the instances of a split."""
    before: Mapping[str, int] = {}
    for step, left in counts.items():
        setting, remedy = _DROPPING.get(step, ("", ""))
        lost = []
        for name in (f"{split}_instances" for split in SPLITS):
            had, has = before.get(name, 0), left.get(name, 0)
            if setting and had - has > LARGE_LOSS * had:
                lost.append(f"{had - has} of {had} {name.removesuffix('_instances')}")
        if lost:
            remark(
                logger,
                setting,
                "%s drops %s instances, more than a fifth; %s",
                setting,
                ", ".join(lost),
                remedy,
            )
        before = left


def say_labels(tally: Tally, splits: Sequence[str]) -> None:
    """Log the labels of each split, and warn of splits on which no attribute can be evaluated.

    Args:
        tally: of the cleaned instances.
        splits: names, in order.
    """
    one_sided = []
    for split in splits:
        place = SPLITS.index(split)
        labels, instances = tally.attributes([place]), int(tally.instances[place].sum())
        both = np.count_nonzero(labels["positive"].astype(bool) & labels["negative"].astype(bool))
        numbers = ", ".join(f"{found.sum()} {kind}" for kind, found in labels.items())
        logger.info(
            "%s: %d instances, labels: %s; attributes with both: %d",
            split,
            instances,
            numbers,
            both,
        )
        if not instances:
            remark(logger, "clean.annotations", "%s: no instance is left in this split", split)
        elif not both:
            one_sided.append(f"{split} ({numbers})")
    if one_sided:
        remark(
            logger,
            "clean.annotations",
            "no attribute has both positive and negative labels in %s: average precision is "
            "undefined there, and so is mAP; annotate both, or count what is unannotated as absent "
            "(evaluation.unannotated: negative)",
            ", ".join(one_sided),
        )
