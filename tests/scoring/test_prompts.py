"""Prompts: order of the feasible pairs, each different text once, templates checked."""

from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scoring.conftest import Model
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.remarks import collected_remarks
from vlal_dist.scoring.clip import ClipEncoder
from vlal_dist.scoring.text_bank import (
    build_prompts,
    check_prompts,
    check_templates,
    encode_bank,
    remark_on_cut_prompts,
)
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


def named(objects: tuple[str, ...], attributes: tuple[str, ...]) -> Any:
    """A dataset with these names, in which every attribute is feasible for every object."""
    count, kinds = len(attributes), len(objects)
    vocabulary = Vocabulary(
        objects=objects,
        attributes=attributes,
        attribute_type=("other",) * count,
        prevalence=("head",) * count,
    )
    feasible = FeasibleSets(
        indptr=np.arange(kinds + 1) * count,
        indices=np.tile(np.arange(count, dtype=np.int32), kinds),
        positive_count=np.ones(kinds * count, np.int32),
        negative_count=np.zeros(kinds * count, np.int32),
    )
    return SimpleNamespace(vocabulary=vocabulary, feasible=feasible)


PLAIN = ["a photo of {attribute} {object}"]
SHORT = named(("cup", "hat"), ("red", "blue"))
WORDS = " ".join(["very"] * 20)


def test_a_long_template(tiny: Model) -> None:
    encoder = tiny.load()  # reads 16 tokens
    with pytest.raises(ConfigError, match=r"scoring\.templates: .*16 tokens.*shorten it"):
        check_prompts(encoder, SHORT, [f"a photo of {WORDS} {{attribute}} {{object}}"])
    check_prompts(encoder, SHORT, PLAIN)
    # One of several is enough: the mean over templates would only hide it.
    with pytest.raises(ConfigError, match=r"scoring\.templates"):
        check_prompts(encoder, SHORT, [*PLAIN, f"a photo of {WORDS} {{attribute}} {{object}}"])


def test_a_cut_that_loses_nothing_that_differs(
    tiny: Model, caplog: pytest.LogCaptureFixture
) -> None:
    check_prompts(tiny.load(), SHORT, [f"a {{attribute}} {{object}} in a {WORDS} scene"])
    assert "4 of 4 prompts are longer than the 16 tokens" in caplog.text
    assert "'a red cup in a very very" in caplog.text
    assert caplog.text.count("scene'") == 2 and "does not see all of 'very" in caplog.text


@pytest.mark.parametrize("template", [f"a {{attribute}} {{object}} in a {WORDS} scene", *PLAIN])
def test_cut_prompts_are_found_again_without_the_check(tiny: Model, template: str) -> None:
    """A scoring that continues has the same remarks as the one that was interrupted."""
    encoder = tiny.load()
    with collected_remarks() as first:
        check_prompts(encoder, SHORT, [template])
    with collected_remarks() as again:
        remark_on_cut_prompts(encoder, SHORT, [template])
    assert again == first and len(first) == (WORDS in template)


@pytest.mark.parametrize(
    "names", [(("cup", "hat"), ("red", WORDS)), ((WORDS, "hat"), ("red", "x"))]
)
def test_one_long_name(tiny: Model, names: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It hides what follows it: the object after an attribute, an attribute after the object."""
    encoder, data = tiny.load(), named(*names)
    template = PLAIN if WORDS in names[1] else ["a photo of {object} that is {attribute}"]
    with pytest.raises(DataError, match=r"the same as others to the model.*clean\.renames"):
        check_prompts(encoder, data, template)
    # Last in the prompt, it loses only its own end.
    other = ["a {object} that is {attribute}"] if template is PLAIN else PLAIN
    check_prompts(encoder, data, other)
    assert "does not see all of" in caplog.text


def test_attributes_that_the_tokenizer_makes_one(tiny: Model) -> None:
    encoder = tiny.load()
    with pytest.raises(DataError, match=r"'red' and 'Red' of 'cup'.*clean\.deleted_attributes"):
        check_prompts(encoder, named(("cup", "hat"), ("red", "Red", "blue")), PLAIN)
    # Equal only in one template, or only of different objects: they can be told apart.
    check_prompts(encoder, named(("cup", "Cup"), ("red", "blue")), PLAIN)
    check_prompts(encoder, named(("b c", "c"), ("a b", "a", "x")), ["{attribute} {object}"])


@pytest.mark.parametrize(
    "name",
    ["{odd}", "{attribute}", "100 %s %(x)d", "two\nlines", "na\u00efve \u2603", "a" * 10_000, ""],
)
def test_odd_names(tiny: Model, name: str) -> None:
    data = named(("cup",), ("red", name))
    prompts, _ = build_prompts(data, PLAIN)
    assert prompts[1] == f"a photo of {name} cup"
    check_prompts(tiny.load(), data, PLAIN)
    assert len(encode_bank(tiny.load(), data, PLAIN, stop=Event())) == 2


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NAMES = st.lists(TEXT, min_size=2, max_size=5, unique=True)


@pytest.fixture(scope="module")
def loaded(tiny: Model) -> ClipEncoder:
    return tiny.load()


@settings(max_examples=25, deadline=None)
@given(objects=NAMES, attributes=NAMES)
def test_what_is_accepted_has_different_vectors(
    loaded: ClipEncoder, objects: list[str], attributes: list[str]
) -> None:
    """The law: no two attributes of one object have one vector; else one line says which."""
    encoder, data = loaded, named(tuple(objects), tuple(attributes))
    try:
        check_prompts(encoder, data, PLAIN)
    except DataError as error:
        assert "\n" not in str(error)
        return
    tokens, _ = encoder.tokens(build_prompts(data, PLAIN)[0])
    for rows in np.split(tokens, len(objects)):
        assert len(np.unique(rows, axis=0)) == len(attributes)


def test_templates_by_attribute_type() -> None:
    lists = {"default": ["{attribute}"], "size": ["{object} is {attribute}", "a {attribute}"]}
    prompts, position = build_prompts(DATASET, lists)
    assert [[prompts[place] for place in row] for row in position] == [
        ["blue", "blue"],  # cup; repeated, which keeps the mean
        ["{odd}", "{odd}"],
        ["blue", "blue"],
        ["tree is tall", "a tall"],
    ]
    with pytest.raises(ConfigError, match=r"templates\.shape: no such .*color, other, size"):
        build_prompts(DATASET, {**lists, "shape": ["{attribute}"]})
    with pytest.raises(ConfigError, match="lacks default"):
        check_templates({"size": ["{attribute}"]})
    with pytest.raises(ConfigError, match="is empty"):
        check_templates({"default": ["{attribute}"], "size": []})
