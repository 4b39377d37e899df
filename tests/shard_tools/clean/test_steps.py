"""Each cleaning step on a few made-up instances, and the counts after it."""

from dataclasses import replace

import pytest

from shard_tools.clean.counts import check_expected, first_departure
from shard_tools.clean.records import Instance
from tests.shard_tools.clean.columns import clean
from vlal_dist.errors import ConfigError
from vlal_dist.vocabulary import Vocabulary

KNOWN = Vocabulary(("car",), ("blue", "red"), ("other", "other"), ("head", "tail"))
BASE = Instance("train", "0", "0", "car", (0.0, 0.0, 60.0, 60.0), ("red",), ("blue",))


def instance(name: str, **changes: object) -> Instance:
    return replace(BASE, instance_id=name, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "height", "kept"),
    [(50, 50, True), (49.99, 500, False), (500, 49.99, False), (50.01, 50, True)],
)
def test_either_side_below_the_limit_drops(width: float, height: float, kept: bool) -> None:
    given = instance("a", box=(0.0, 0.0, width, height))
    assert bool(clean([given], min_side=50).instances) is kept


def test_rename_leaves_other_names() -> None:
    given = [instance("a"), instance("b", object_name="bus")]
    renamed = clean(given, renames={"car": "auto"}).instances
    assert [i.object_name for i in renamed] == ["auto", "bus"]


def test_deleted_attributes_leave_both_lists() -> None:
    given = instance("a", positive=("red", "worn"), negative=("worn",))
    left = clean([given], deleted_attributes=["worn"]).instances
    assert (left[0].positive, left[0].negative) == (("red",), ())


def test_unknown_names_are_rejected_with_the_name() -> None:
    instances = [
        instance("a"),
        instance("b", object_name="bus"),
        instance("c", positive=("red", "odd"), negative=("odd", "new")),
    ]
    result = clean(instances, known=KNOWN)
    assert [i.instance_id for i in result.instances] == ["a"]
    assert [(r.instance_id, r.reason, r.detail) for r in result.rejects] == [
        ("b", "unknown_object", "bus"),
        ("c", "unknown_attribute", "odd, new"),
    ]


def test_only_negatives_are_not_enough() -> None:
    assert clean([instance("a", positive=())], require_positive=True).instances == []


def test_negative_wins_a_clash_and_is_counted() -> None:
    given = instance("a", positive=("red", "big", "red"), negative=("big", "blue", "blue"))
    result = clean([given])
    found = result.instances[0]
    assert (found.positive, found.negative) == (("red",), ("big", "blue"))
    assert result.cleaned.clashes == 1


def test_an_instance_whose_only_positive_clashes_stays() -> None:
    result = clean([instance("a", positive=("red",), negative=("red",))], require_positive=True)
    assert (result.instances[0].positive, result.cleaned.clashes) == ((), 1)


class Recorder:
    """A dictionary in which all names are similar; keeps what it was asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def first_synset(self, word: str) -> str | None:
        self.seen.append(word)
        return "thing"

    def shortest_noun_lemma(self, word: str) -> str:
        return word


def test_the_dictionary_merges_names_of_large_instances_in_order() -> None:
    instances = [
        instance("a", object_name="tiny", box=(0.0, 0.0, 9.0, 9.0)),
        instance("b", object_name="cars"),
        instance("c"),
        instance("d"),
    ]
    recorder = Recorder()
    cleaned = clean(instances, merge=recorder, min_side=50).cleaned  # type: ignore[arg-type]
    assert recorder.seen == ["cars", "car"]
    assert cleaned.merges == {"cars": "car"}  # the more frequent one
    assert cleaned.objects == ("car",)


def test_a_merge_table_may_hold_more_names() -> None:
    table = {"cars": "car", "unseen": "x", "car": "car"}
    cleaned = clean([instance("b", object_name="cars"), instance("c")], merge=table).cleaned
    assert (cleaned.merges, cleaned.objects) == ({"cars": "car"}, ("car",))


def test_steps_in_order_with_counts() -> None:
    instances = [
        instance("a", object_name="cars"),
        instance("b", positive=("worn",)),
        instance("c", object_name="tee shirt", split="test", positive=("red", "big")),
        instance("d", object_name="pin", box=(0.0, 0.0, 10.0, 60.0)),
    ]
    cleaned = clean(
        instances,
        min_side=50,
        merge={"cars": "car"},
        renames={"tee shirt": "t shirt"},
        deleted_attributes=["worn"],
        require_positive=True,
    ).cleaned
    shown = ("instances", "objects", "attributes", "positive_pairs", "negative_annotations")
    table = {step: [counts[name] for name in shown] for step, counts in cleaned.counts.items()}
    assert table == {
        "read": [4, 4, 4, 5, 4],
        "min_side": [3, 3, 4, 4, 3],
        "merge": [3, 2, 4, 4, 3],
        "rename": [3, 2, 4, 4, 3],
        "delete_attributes": [3, 2, 3, 3, 3],
        "require_positive": [2, 2, 3, 3, 2],
    }
    # The vocabulary is taken before instances without positives go.
    assert (cleaned.objects, cleaned.attributes) == (("car", "t shirt"), ("big", "blue", "red"))
    last = cleaned.counts["require_positive"]
    assert (last["train_instances"], last["test_instances"]) == (1, 1)
    assert (last["test_positive_attributes"], last["test_annotated_pairs"]) == (2, 3)
    assert "val_instances" not in last


def test_vocabulary_keeps_names_of_instances_dropped_without_positives() -> None:
    dropped = instance("b", object_name="bus", positive=(), negative=("odd",))
    result = clean([instance("a"), dropped], require_positive=True)
    names = (result.cleaned.objects, result.cleaned.attributes)
    assert names == (("bus", "car"), ("blue", "odd", "red"))
    assert [i.instance_id for i in result.instances] == ["a"]


def test_instances_without_positives_can_stay() -> None:
    result = clean([instance("a", positive=())], require_positive=False)
    assert len(result.instances) == 1
    assert "require_positive" not in result.cleaned.counts


def test_known_names_come_after_merge_and_deletion() -> None:
    instances = [instance("a", object_name="cars", positive=("red", "worn")), instance("b")]
    result = clean(
        [*instances, instance("c", object_name="bus")],
        merge={"cars": "car"},
        deleted_attributes=["worn"],
        known=KNOWN,
    )
    assert [i.instance_id for i in result.instances] == ["a", "b"]
    assert [r.instance_id for r in result.rejects] == ["c"]
    assert result.cleaned.counts["known_names"]["instances"] == 2


def test_facts_do_not_depend_on_the_order_of_instances() -> None:
    instances = [
        instance(str(i), object_name=f"o{i % 3}", positive=(f"a{i % 4}",)) for i in range(9)
    ]
    forward, backward = clean(instances).cleaned, clean(instances[::-1], batch=2).cleaned
    assert forward.counts == backward.counts
    assert (forward.objects, forward.attributes) == (backward.objects, backward.attributes)


def test_the_first_departing_step_is_named() -> None:
    counts = clean([BASE]).cleaned.counts
    counts = {step: counts[step] for step in ("read", "min_side", "merge")}
    good = {"read": {"instances": 1, "val_instances": 0}}
    assert first_departure(counts, good) is None
    # In the order of the steps, whatever the order of the file.
    bad = {"merge": {"objects": 2}, "min_side": {"objects": 3, "instances": 1}}
    assert first_departure(counts, {**bad, **good}) == "min_side: objects 1 instead of 3"
    # A step that did not run cannot meet what is expected of it.
    assert first_departure(counts, {"known_names": {"instances": 5}, **good}) == (
        "known_names: this step did not run"
    )


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"reed": {}}, "step 'reed'; known are read, min_side"),
        ({"read": {"cars": 1}}, "count 'cars'; known are instances"),
        ({"feasible": {"instances": 1}}, "count 'instances'; known are pairs"),
    ],
)
def test_misspelt_expectations_are_refused(
    expected: dict[str, dict[str, int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_expected(expected)
