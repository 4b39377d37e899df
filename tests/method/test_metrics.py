"""AP against scikit-learn, and the other scores against VAW's rules written out slowly."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score

import vlal_dist.method.metrics as metrics
from vlal_dist.errors import DataError
from vlal_dist.method.metrics import average_precision, evaluate, select_top_k


@st.composite
def scored_labels(draw):
    shape = (draw(st.integers(1, 25)), draw(st.integers(1, 6)))
    label = draw(arrays.arrays(np.int8, shape, elements=st.sampled_from([-1, 0, 1])))
    score = draw(arrays.arrays(np.float32, shape, elements=st.integers(0, 8).map(lambda v: v / 8)))
    return score, label


def oracle_ap(score, label):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where there is no positive
        return [
            average_precision_score(label[label[:, a] != 0, a] > 0, score[label[:, a] != 0, a])
            if (label[:, a] != 0).any()
            else 0.0
            for a in range(label.shape[1])
        ]


@given(scored_labels())
@settings(deadline=None, max_examples=150)
def test_ap_equals_scikit_learns(case):
    np.testing.assert_allclose(average_precision(*case), oracle_ap(*case), atol=1e-12)


def test_ap_of_distinct_scores_and_in_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    score, label = rng.random((500, 30)), rng.integers(-1, 2, (500, 30)).astype(np.int8)
    whole = average_precision(score, label)
    np.testing.assert_allclose(whole, oracle_ap(score, label), atol=1e-12)
    evaluation = evaluate(score, label, groups={"overall": range(30)})
    monkeypatch.setattr(metrics, "_CHUNK_CELLS", 1700)
    assert np.array_equal(average_precision(score, label), whole)
    assert evaluate(score, label, groups={"overall": range(30)}).groups == evaluation.groups


def slow_counts(predicted, label):
    """tp, fp, tn, fn of one attribute."""
    count = [0, 0, 0, 0]
    for guess, truth in zip(predicted, label, strict=True):
        if truth:
            count[(0 if truth > 0 else 1) if guess else (3 if truth > 0 else 2)] += 1
    return count


def slow_rates(tp, fp, tn, fn):
    """recall, true negative rate and F1 by VAW's rules."""
    if tp + fp == 0:
        recall, precision = 0, 1
    else:
        recall = tp / (tp + fn) if tp + fn else -1
        precision = tp / (tp + fp)
    rate = tn / (tn + fp) if tn + fp else -1
    f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0
    return recall, rate, f1


def slow_scores(score, label, ids, top_k, threshold):
    above = [[value > threshold for value in row] for row in score]
    top = []
    for row in score:
        best = sorted(range(len(row)), key=lambda a: (-row[a], a))[:top_k]
        top.append([a in best and row[a] > 0 for a in range(len(row))])
    accuracies, recalls, pooled = [], [], [0, 0, 0, 0]
    for a in ids:
        truth = [row[a] for row in label]
        recall, rate, _ = slow_rates(*slow_counts([row[a] for row in above], truth))
        accuracies.append(-1 if -1 in (recall, rate) else (recall + rate) / 2)
        counts = slow_counts([row[a] for row in top], truth)
        recalls.append(slow_rates(*counts)[0])
        pooled = [x + y for x, y in zip(pooled, counts, strict=True)]

    def mean(values):
        return -1 if -1 in values else sum(values) / len(values)

    return mean(accuracies), mean(recalls), slow_rates(*pooled)[2]


@given(scored_labels(), st.integers(1, 7))
@settings(deadline=None, max_examples=150)
def test_scores_equal_the_evaluators_rules(case, top_k):
    score, label = case
    num_attributes = label.shape[1]
    groups = {"overall": list(range(num_attributes)), "last": [num_attributes - 1]}
    found = evaluate(score, label, groups=groups, top_k=top_k).groups
    ap = oracle_ap(score, label)
    for name, ids in groups.items():
        accuracy, recall, f1 = slow_scores(score, label, ids, top_k, 0.5)
        got = found[name]
        assert got["mA"] == pytest.approx(accuracy)
        assert got[f"mR@{top_k}"] == pytest.approx(recall)
        assert got[f"F1@{top_k}"] == pytest.approx(f1)
        assert got["mAP_vaw"] == pytest.approx(np.mean([ap[a] for a in ids]))
        defined = [ap[a] for a in ids if (label[:, a] > 0).any() and (label[:, a] < 0).any()]
        assert got["num_classes"] == len(defined) and got["num_classes_vaw"] == len(ids)
        assert got["mAP"] == (pytest.approx(np.mean(defined)) if defined else None)


def test_undefined_attributes():
    """No positive: AP 0 by VAW's rule; no negative: 1; neither enters `mAP`."""
    score = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]])
    label = np.array([[1, -1, 1, 0], [-1, -1, 1, 0]], np.int8)
    groups = {"overall": [0, 1, 2, 3], "empty": []}
    found = evaluate(score, label, groups=groups, top_k=4)
    assert found.attributes.ap.tolist() == [1, 0, 1, 0]
    assert found.attributes.defined.tolist() == [True, False, False, False]
    assert found.attributes.num_positive.tolist() == [1, 0, 2, 0]
    assert found.attributes.num_negative.tolist() == [1, 2, 0, 0]
    assert found.attributes.num_unannotated.tolist() == [0, 0, 0, 2]
    overall = found.groups["overall"]
    assert overall["mAP"] == 1 and overall["mAP_vaw"] == 0.5 and overall["mA"] == -1
    assert found.groups["empty"] == {
        "mAP": None, "num_classes": 0, "mAP_vaw": None, "num_classes_vaw": 0,
        "mA": None, "mR@4": None, "F1@4": None,
    }  # fmt: skip


def test_top_k_ties_and_zeros():
    score = np.float32([[0.5, 0.7, 0.5, 0.5], [0, 0, 0.1, 0]])
    assert select_top_k(score, 2).tolist() == [
        [True, True, False, False],
        [False, False, True, False],
    ]
    assert select_top_k(score, 9).sum() == 5


def test_bad_input():
    with pytest.raises(DataError, match="one \\[N, A\\]"):
        average_precision(np.zeros((2, 3)), np.zeros((3, 2), np.int8))
    with pytest.raises(DataError, match="finite"):
        evaluate(np.array([[np.nan]]), np.array([[1]], np.int8), groups={})


def test_empty_split():
    found = evaluate(np.zeros((0, 2)), np.zeros((0, 2), np.int8), groups={"overall": [0, 1]})
    assert found.groups["overall"]["mAP"] is None and found.attributes.ap.tolist() == [0, 0]


@given(scored_labels(), st.sampled_from(["list", "torch", "half"]))
@settings(deadline=None, max_examples=50)
def test_arrays_of_other_libraries_give_the_same(case, kind):
    score, label = case
    wanted = evaluate(score, label)
    if kind == "list":
        found = evaluate(score.tolist(), label.tolist())
    else:  # eighths are exact in 16 bits
        there = torch.from_numpy(score).requires_grad_()
        there = there.to(torch.bfloat16) if kind == "half" else there
        found = evaluate(there, torch.from_numpy(label).float())
    assert found.groups == wanted.groups and found.mAP == wanted.mAP
    assert np.array_equal(found.attributes.ap, wanted.attributes.ap)
    assert wanted.mAP == wanted.groups["overall"]["mAP"]


def test_groups_by_name_and_by_id():
    rng = np.random.default_rng(1)
    score, label = rng.random((40, 4)), rng.integers(-1, 2, (40, 4))
    names = ["red", "wooden", "tall", "wet"]
    by_id = evaluate(score, label, groups={"looks": [0, 3], "all": range(4)})
    by_name = evaluate(score, label, names, {"looks": ["red", "wet"], "all": names})
    assert by_id.groups == by_name.groups
    assert by_name.ap == dict(zip(names, by_name.attributes.ap.tolist(), strict=True))
    assert list(by_id.ap) == ["0", "1", "2", "3"]
    assert by_id.mAP == by_id.groups["all"]["mAP"] != by_id.groups["looks"]["mAP"]
    label[:, 2] = 1
    undefined = evaluate(score, label, names)
    assert undefined.ap["tall"] is None and undefined.ap["red"] is not None
    assert evaluate(score, label * 0).mAP is None


SCORES, LABELS = np.full((2, 3), 0.5), np.array([[1, 0, -1], [0, 1, 1]])
REFUSED = [
    ((SCORES, LABELS * 2), {}, "labels: a value is not -1"),
    ((SCORES, LABELS * 0.5), {}, "labels: a value is not -1"),
    ((SCORES, LABELS > 0), {}, "labels: bool; give integers"),
    ((SCORES, LABELS[:1]), {}, r"one \[N, A\]"),
    ((SCORES[:1], LABELS), {}, r"one \[N, A\]"),
    ((SCORES, LABELS[0]), {}, r"one \[N, A\]"),
    ((SCORES * np.nan, LABELS), {}, "a score is not finite"),
    ((LABELS, LABELS), {}, "scores: int64; give floating"),
    ((SCORES, LABELS), {"names": ["a", "b"]}, "names: 2; give distinct ones for all 3"),
    ((SCORES, LABELS), {"names": ["a", "b", "a"]}, "names: 3; give distinct ones for all 3"),
    (
        (SCORES, LABELS),
        {"groups": {"g": [3]}},
        r"group 'g' has the attribute 3; give ids in 0",
    ),
    ((SCORES, LABELS), {"groups": {"g": [-1]}}, "group 'g' has the attribute -1"),
    ((SCORES, LABELS), {"groups": {"g": ["a"]}}, "group 'g' has the attribute 'a'"),
    ((SCORES, LABELS), {"top_k": 0}, "top_k is 0"),
]


@pytest.mark.parametrize(("given", "options", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*given, **options)
