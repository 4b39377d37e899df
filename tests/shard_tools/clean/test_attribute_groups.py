"""Attribute groups: the look-up rule, and VAW's sizes on the 591 attributes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shard_tools.clean.vocabulary import attribute_types, listed_prevalence, prevalence_by_count
from vlal_dist.config.load import load_config
from vlal_dist.errors import DataError

VAW = Path(__file__).parents[4] / "shared" / "data" / "vaw_metadata"
CONFIG = Path(__file__).parents[3] / "configs" / "vaw.yaml"
needs_vaw = pytest.mark.skipif(not VAW.is_dir(), reason="VAW's metadata files are absent")

NO_SUBTYPE = """
abandoned, almost empty, backless, being used, bell shaped, bushy, chipped, crossing arms,
diagonal, dressed, holed, muscular, neat, numbered, nylon, overgrown, partially visible, perched,
pulled back, raising arm, ridged, side view, staring, translucent, turned off, unmade,
using phone, wearing bow tie, wearing headband, wheeled, white framed, wool"""


def read(name: str) -> Any:
    return json.loads((VAW / name).read_text(encoding="utf-8"))


@pytest.fixture
def attributes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """VAW's 620 names less the 29 that configs/vaw.yaml deletes."""
    monkeypatch.setenv("VAW", "unused")
    deleted = load_config(str(CONFIG), {}).clean.deleted_attributes
    names = set(read("attribute_index.json"))
    assert len(names) == 620
    assert len(set(deleted)) == 29
    assert set(deleted) <= names
    return sorted(names - set(deleted))


@needs_vaw
def test_group_sizes_of_vaw(attributes: list[str]) -> None:
    assert len(attributes) == 591
    prevalence = Counter(listed_prevalence(attributes, read("head_tail.json")))
    assert prevalence == {"head": 278, "medium": 235, "tail": 78}
    types = attribute_types(
        attributes,
        types=read("attribute_types.json"),
        parent_types=read("attribute_parent_types.json"),
    )
    assert Counter(types) == {
        "color": 80,
        "material": 48,
        "shape": 31,
        "size": 19,
        "texture": 22,
        "action": 55,
        "state": 43,
        "other": 293,
    }
    type_of = dict(zip(attributes, types, strict=True))
    names = [name.strip() for name in " ".join(NO_SUBTYPE.split()).split(",")]
    assert len(names) == 32
    assert {type_of[name] for name in names} == {"other"}


@needs_vaw
def test_shares_reproduce_the_sizes_of_vaw(attributes: list[str]) -> None:
    counted = Counter(prevalence_by_count(attributes, {}))
    assert counted == {"head": 278, "medium": 236, "tail": 77}  # 13 % of 591 is 76.8


def test_the_first_type_and_the_first_parent_win() -> None:
    types = {
        "hair color": ["blond"],
        "tone": ["dark"],
        "color": ["dark", "red"],
        "closeness": ["far"],
    }
    parents = {"color": ["color", "hair color"], "other": ["tone"], "state": ["color"]}
    given = ("blond", "dark", "far", "red", "unlisted")
    assert attribute_types(given, types=types, parent_types=parents) == (
        ("color", "other", "other", "color", "other")
    )
    assert attribute_types(given, types=types, parent_types=None) == (
        ("hair color", "tone", "closeness", "color", "other")
    )
    assert attribute_types(given, types={}, parent_types=None) == ("other",) * 5


def test_prevalence_by_count_ranks_by_positives_then_name() -> None:
    names = [f"a{i:02d}" for i in range(100)]
    groups = prevalence_by_count(names, {"a99": 7, "a50": 9})
    assert Counter(groups) == {"head": 47, "medium": 40, "tail": 13}
    of = dict(zip(names, groups, strict=True))
    assert of["a99"] == of["a50"] == of["a00"] == of["a44"] == "head"
    assert of["a45"] == "medium"
    assert of["a98"] == "tail"
    assert prevalence_by_count([], {}) == ()
    assert prevalence_by_count(["one"], {"one": 1}) == ("medium",)


def test_an_unlisted_attribute_is_named() -> None:
    with pytest.raises(DataError, match=r"does not list 1 of 2 attributes \('b'"):
        listed_prevalence(["a", "b"], {"head": ["a"], "medium": [], "tail": []})
    with pytest.raises(DataError, match="allowed are head, medium, tail"):
        listed_prevalence(["a"], {"heads": ["a"]})
