"""Rows of Table 1, and the pairs that PSL ignores."""

import pytest
import torch

from vlal_dist.config.sections import LossConfig
from vlal_dist.method.ignore_set import psl_ignored
from vlal_dist.method.selective_loss import assign_terms, selective_loss


@pytest.mark.parametrize(
    ("name", "gammas", "unannotated"),
    [
        ("selective", (1, 2, 4, 7), "draw"),
        ("ce_ignoring", (0, 0, 0, 0), "ignore"),
        ("ce_negatifying", (0, 0, 0, 0), "negatify"),
        ("asl_ignoring", (1, 2, 4, 4), "ignore"),
        ("asl_negatifying", (1, 2, 4, 4), "negatify"),
        ("psl", (1, 2, 4, 4), "psl"),
    ],
)
def test_rows_of_table_1(name, gammas, unannotated):
    found = LossConfig(loss=name)
    assert (found.gammas, found.unannotated) == (gammas, unannotated)
    other = LossConfig(loss=name, gamma_feasible=3.0, draw="top")
    assert other.gammas == ((1, 2, 3, 7) if name == "selective" else gammas)
    assert other.unannotated == ("top" if name == "selective" else unannotated)


def test_options_are_numbers_in_the_order_of_gammas():
    loss = LossConfig(margin=0.1, detach_focal=False, gamma_negative=2.5)
    assert list(loss.options.values()) == [1.0, 2.5, 4.0, 7.0, 0.1, 0.0]
    assert list(loss.options) == list(LossConfig(loss="psl").options)


def test_ce_negatifying_is_binary_cross_entropy():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    label = torch.randint(-1, 2, (5, 7), generator=torch.Generator().manual_seed(1))
    term = assign_terms(label.to(torch.int8), label > 5, label > 5)
    config = LossConfig(loss="ce_negatifying", margin=0.0)
    loss = selective_loss(logits, term, loss=config).per_row
    target = (label > 0).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, target, reduction="none"
    )
    torch.testing.assert_close(loss, expected.sum(1))


def slow_psl(probability, unannotated, prior, threshold, top_k, margin):
    """By sorting (clipped probability, position) of all unannotated pairs in Python."""
    rows, attributes = probability.shape
    pairs = [(r, a) for r in range(rows) for a in range(attributes) if unannotated[r, a]]
    ranked = sorted(pairs, key=lambda pair: -max(probability[pair].item(), margin))
    chosen = {*ranked[: top_k * rows], *(p for p in pairs if prior[p[1]] > threshold)}
    return [[(r, a) in chosen for a in range(attributes)] for r in range(rows)]


@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_psl_equals_plain_sorting(top_k, margin):
    generator = torch.Generator().manual_seed(top_k)
    probability = (torch.rand(9, 11, generator=generator) * 8).round() / 8  # many ties
    unannotated = torch.rand(9, 11, generator=generator) < 0.7
    prior = torch.rand(11, generator=generator)
    loss = LossConfig(psl_threshold=0.8, psl_topk=top_k, margin=margin)
    found = psl_ignored(probability=probability, unannotated=unannotated, prior=prior, loss=loss)
    assert found.tolist() == slow_psl(probability, unannotated, prior, 0.8, top_k, margin)


def test_pairs_ignored_by_the_prior_use_the_quota():
    found = psl_ignored(
        probability=torch.tensor([[0.9, 0.8, 0.7]]),
        unannotated=torch.ones(1, 3, dtype=torch.bool),
        prior=torch.tensor([1.0, 0.0, 0.0]),
        loss=LossConfig(psl_topk=1),
    )
    assert found.tolist() == [[True, False, False]]


def test_psl_ranks_over_the_whole_batch():
    found = psl_ignored(
        probability=torch.tensor([[0.9, 0.8], [0.1, 0.2]], requires_grad=True),
        unannotated=torch.ones(2, 2, dtype=torch.bool),
        prior=torch.zeros(2),
        loss=LossConfig(psl_topk=1, margin=0.0),
    )
    assert found.tolist() == [[True, True], [False, False]] and not found.requires_grad
