"""The paper by hand: Eqs. (1) to (4) and Fig. 3 on three attributes, in plain Python."""

import math

import numpy as np
import pytest
import torch

from vlal_dist.config.sections import LossConfig
from vlal_dist.method.feasible import feasible_sets
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.method.likelihood import inverse_weights, log_likelihood
from vlal_dist.method.selective_loss import Term, assign_terms, selective_loss

GAMMA = {"positive": 1, "negative": 2, "feasible": 4, "infeasible": 7}  # Sec. 3.2
LOSS = LossConfig(margin=0.0, detach_focal=False)


def test_omega_o_is_co_occurrence_on_training_annotations():
    """Sec. 2.2: shirt 0 was seen red (0) and not wet (2), shirt 1 red; a dog wet."""
    sets = feasible_sets(
        object_id=np.array([0, 0, 1]),
        positive_indptr=np.array([0, 1, 2, 3]),
        positive=np.array([0, 0, 2]),
        negative_indptr=np.array([0, 1, 1, 1]),
        negative=np.array([2]),
        num_objects=2,
    )
    assert sets.of(0).tolist() == [0, 2] and sets.of(1).tolist() == [2]


def test_eq_2_likelihood():
    """Eq. (2): softmax of cosine / tau over the feasible set."""
    cosines, tau = [0.30, 0.28, 0.25], 0.01
    total = sum(math.exp(c / tau) for c in cosines)
    expected = [math.exp(c / tau) / total for c in cosines]
    found = log_likelihood(np.array(cosines, np.float32), np.array([0, 3]), temperature=tau)
    assert np.exp(found).tolist() == pytest.approx(expected, rel=1e-4)
    assert np.exp(found).sum() == pytest.approx(1)


def paper_loss(p, label, feasible, ignored):
    """Eqs. (1), (3), (4), attribute by attribute, minimised."""
    total = 0.0
    for p_a, y_a, in_omega, drawn in zip(p, label, feasible, ignored, strict=True):
        omega_a = 0 if drawn else 1  # Eq. (4)
        if y_a == 1:
            total -= (1 - p_a) ** GAMMA["positive"] * math.log(p_a)
        elif y_a == -1:
            total -= p_a ** GAMMA["negative"] * math.log(1 - p_a)
        elif in_omega:
            total -= omega_a * p_a ** GAMMA["feasible"] * math.log(1 - p_a)
        else:
            total -= p_a ** GAMMA["infeasible"] * math.log(1 - p_a)
    return total


@pytest.mark.parametrize(
    ("label", "feasible", "ignored"),
    [
        ([1, -1, 0], [True, True, True], [False, False, False]),
        ([1, -1, 0], [True, True, True], [True, True, True]),
        ([0, 0, 0], [True, True, False], [True, False, False]),
        ([1, 0, 0], [False, False, True], [False, False, False]),
    ],
)
def test_eqs_1_3_4_loss(label, feasible, ignored):
    p = [0.7, 0.2, 0.6]
    term = assign_terms(
        torch.tensor([label], dtype=torch.int8), torch.tensor([feasible]), torch.tensor([ignored])
    )
    logits = torch.tensor([[math.log(v / (1 - v)) for v in p]], dtype=torch.float64)
    loss = selective_loss(logits, term, loss=LOSS).per_row
    assert loss.item() == pytest.approx(paper_loss(p, label, feasible, ignored), rel=1e-12)


def test_eq_4_annotated_pairs_are_never_ignored():
    label = torch.tensor([[1, -1, 0]], dtype=torch.int8)
    everything = torch.ones(1, 3, dtype=torch.bool)
    term = assign_terms(label, everything, everything)
    assert term.tolist() == [[Term.POSITIVE, Term.NEGATIVE, Term.IGNORED]]


def inclusion(g, size):
    """P(attribute in the sample) of Fig. 3's choice(replace=False, p=g), path by path."""
    result = [0.0] * len(g)

    def follow(left, probability, drawn):
        if len(drawn) == size:
            for a in drawn:
                result[a] += probability
            return
        mass = sum(g[a] for a in left)
        for a in left:
            follow([b for b in left if b != a], probability * g[a] / mass, [*drawn, a])

    follow(list(range(len(g))), 1.0, [])
    return result


def test_fig_3_draw():
    """NUM_IGNORE of the feasible attributes, without replacement, probabilities G."""
    rows, num_ignore = 40_000, 2
    logs = log_likelihood(np.float32([0.30, 0.295, 0.28]), np.array([0, 3]), temperature=0.01)
    expected = inclusion(np.exp(logs).tolist(), num_ignore)
    weight = torch.zeros(rows, 5)  # attributes 1 and 4 are not feasible
    places = [0, 2, 3]
    weight[:, places] = torch.from_numpy(inverse_weights(logs, np.array([0, 3])))
    feasible = torch.tensor([True, False, True, True, False]).repeat(rows, 1)
    ignored = sample_ignore_set(
        inverse_weight=weight,
        drawable=feasible,
        num_ignore=num_ignore,
        uid=torch.arange(rows),
        visit=torch.zeros(rows, dtype=torch.int64),
        seed=0,
    )
    assert (ignored.sum(1) == num_ignore).all() and not (ignored & ~feasible).any()
    frequency = ignored[:, places].double().mean(0).tolist()
    for found, exact in zip(frequency, expected, strict=True):
        assert abs(found - exact) < 4.5 * math.sqrt(exact * (1 - exact) / rows)


def test_fig_3_draw_from_fewer_than_num_ignore():
    """Where numpy's choice would raise, the whole feasible set is ignored."""
    ignored = sample_ignore_set(
        inverse_weight=torch.ones(1, 3),
        drawable=torch.tensor([[True, True, False]]),
        num_ignore=30,
        uid=torch.tensor([1]),
        visit=torch.tensor([0]),
        seed=0,
    )
    assert ignored.tolist() == [[True, True, False]]
