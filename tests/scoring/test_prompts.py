"""Prompts: order of the feasible pairs, each different text once, templates checked."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlal_dist.errors import ConfigError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.scoring.text_bank import build_prompts, check_templates
from vlal_dist.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    objects=("cup", "sky", "tree"),
    attributes=("blue", "tall", "{odd}"),
    attribute_type=("color", "size", "other"),
    prevalence=("head", "head", "tail"),
)
# cup: blue, {odd}; sky: none; tree: blue, tall
FEASIBLE = FeasibleSets(
    indptr=np.array([0, 2, 2, 4]),
    indices=np.array([0, 2, 0, 1], np.int32),
    positive_count=np.ones(4, np.int32),
    negative_count=np.zeros(4, np.int32),
)
DATASET: Any = SimpleNamespace(vocabulary=VOCABULARY, feasible=FEASIBLE)


def test_pairs_in_the_order_of_the_feasible_sets() -> None:
    prompts, position = build_prompts(DATASET, ["a photo of {attribute} {object}"])
    assert prompts == [
        "a photo of blue cup",
        "a photo of {odd} cup",
        "a photo of blue tree",
        "a photo of tall tree",
    ]
    assert position.tolist() == [[0], [1], [2], [3]]


def test_equal_prompts_are_kept_once() -> None:
    prompts, position = build_prompts(DATASET, ["{attribute}", "{attribute} {object}"])
    assert len(prompts) == len(set(prompts)) == 7
    assert position[0, 0] == position[2, 0]  # "blue", of cup and of tree
    assert position.shape == (4, 2)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "empty"),
        (["a photo"], "lacks {attribute}"),
        (["a {{attribute}}"], "lacks {attribute}"),
        (["a {colour} {attribute}"], "nothing else in braces"),
        (["a {attribute"], "nothing else in braces"),
        (["a {attribute!r}"], "nothing else in braces"),
        (["a {attribute:>9}"], "nothing else in braces"),
        (["a {attribute.__class__}"], "nothing else in braces"),
        (["a {} {attribute}"], "nothing else in braces"),
    ],
)
def test_templates_are_checked(templates: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=r"scoring\.templates") as error:
        check_templates(templates)
    assert message in str(error.value)


def test_doubled_braces_are_text() -> None:
    check_templates(["{{a}} photo of {attribute} {object}"])
