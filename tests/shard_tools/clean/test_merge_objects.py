"""Merge of object names: the greedy rule, and the groups that the authors' notebook printed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.clean.wordnet import WordNet, group_names, merge_table

FOLDER = Path("/usr/share/wordnet")
SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "visual_genome_sample" / "vg100.json"
needs_wordnet = pytest.mark.skipif(
    not (FOLDER / "index.noun").is_file(), reason="WordNet 3.0 (Debian: wordnet-base) is absent"
)

PRINTED = {
    "floor": {"floor": 1819, "flooring": 72, "floors": 36},
    "railing": {"railing": 342, "rail": 158, "rails": 47, "railings": 31, "runway": 42},
    "bush": {"shrubs": 57, "bushes": 317, "shrub": 69, "bush": 620},
    "spot": {"place": 5, "spot": 100, "spots": 91},
    "rock": {"rocks": 245, "stone": 107, "rock": 413, "stones": 62},
    "car": {"car": 1827, "cars": 199, "automobile": 1},
    "patch": {"patch": 86, "patches": 10, "speckles": 1},
    "motorcycle": {"motorcycle": 540, "bike": 396, "bikes": 24, "motorcycles": 28},
    "phone": {"phone": 133, "telephone": 11, "phones": 1},
    "plane": {"airplane": 354, "plane": 596, "airplanes": 18, "aeroplane": 1, "planes": 41},
}


@dataclass(frozen=True)
class TinyLexicon(WordNet):
    synsets: Mapping[str, str]
    lemmas: Mapping[str, str]

    def first_synset(self, word: str) -> str | None:
        return self.synsets.get(word)

    def shortest_noun_lemma(self, word: str) -> str:
        return self.lemmas.get(word, word)


def groups_by_scan(names: list[str], lexicon: WordNet) -> list[list[str]]:
    """The rule without look-up tables: scan all groups and all members."""
    groups: list[list[str]] = []
    for name in names:
        for group in groups:
            if any(similar(name, member, lexicon) for member in group):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def similar(one: str, other: str, lexicon: WordNet) -> bool:
    synsets = [lexicon.first_synset(name) or name for name in (one, other)]
    lemmas = [lexicon.shortest_noun_lemma(name) for name in (one, other)]
    return synsets[0] == synsets[1] or lemmas[0] == lemmas[1]


@needs_wordnet
def test_printed_groups() -> None:
    counts = {name: count for members in PRINTED.values() for name, count in members.items()}
    wordnet = WordNet(str(FOLDER))
    assert group_names(counts, wordnet) == [list(members) for members in PRINTED.values()]
    expected = {
        name: representative
        for representative, members in PRINTED.items()
        for name in members
        if name != representative
    }
    assert merge_table(counts, wordnet) == expected


@needs_wordnet
def test_names_that_stay_apart() -> None:
    names = ["donut", "doughnut", "fridge", "refrigerator", "bicycle", "bike", "people", "person"]
    names += ["teddy bear", "teddy bears", "grey", "gray", "t shirt", "t-shirt"]
    groups = group_names(dict.fromkeys(names, 1), WordNet(str(FOLDER)))
    assert groups == [[name] for name in names]


@needs_wordnet
def test_glasses_join_glass_by_lemma() -> None:
    groups = group_names({"glass": 5, "glasses": 2, "couch": 1, "sofa": 1}, WordNet(str(FOLDER)))
    assert groups == [["glass", "glasses"], ["couch", "sofa"]]


def test_groups_are_never_joined_later() -> None:
    # c is similar to a (synset) and to b (lemma): it enters a's group, b stays alone.
    lexicon = TinyLexicon({"a": "s1", "b": "s2", "c": "s1"}, {"b": "l", "c": "l"})
    assert group_names({"a": 1, "b": 1, "c": 1}, lexicon) == [["a", "c"], ["b"]]
    # d is similar to b and c; the first group with any similar member is a's, by c.
    assert group_names({"a": 1, "b": 1, "c": 1, "d": 1}, TinyLexicon(
        {"a": "s1", "b": "s2", "c": "s1", "d": "s4"}, {"b": "l", "c": "l", "d": "l"}
    )) == [["a", "c", "d"], ["b"]]  # fmt: skip


def test_representative_is_the_most_frequent_and_the_earliest_of_equals() -> None:
    lexicon = TinyLexicon(dict.fromkeys("abc", "s"), {})
    assert merge_table({"a": 1, "b": 3, "c": 3}, lexicon) == {"a": "b", "c": "b"}
    assert merge_table({}, lexicon) == {}


WORDS = st.sampled_from("abcdefgh")


@given(
    names=st.lists(WORDS, unique=True),
    synsets=st.dictionaries(WORDS, st.sampled_from(["s1", "s2", "s3"])),
    lemmas=st.dictionaries(WORDS, st.sampled_from(["a", "b", "l1", "l2"])),
)
def test_look_ups_equal_the_scan(
    names: list[str], synsets: dict[str, str], lemmas: dict[str, str]
) -> None:
    lexicon = TinyLexicon(synsets, lemmas)
    assert group_names(dict.fromkeys(names, 1), lexicon) == groups_by_scan(names, lexicon)


@needs_wordnet
@pytest.mark.skipif(not SAMPLE.is_file(), reason="the Visual Genome sample is absent")
def test_real_names_equal_the_scan() -> None:
    wordnet = WordNet(str(FOLDER))
    names = [record["object_name"] for record in json.loads(SAMPLE.read_text(encoding="utf-8"))]
    order = list(dict.fromkeys(names))[:500]
    # The scan asks for each pair; look every name up once.
    synsets = {name: wordnet.first_synset(name) or name for name in order}
    lemmas = {name: wordnet.shortest_noun_lemma(name) for name in order}
    groups = group_names(dict.fromkeys(order, 1), wordnet)
    assert groups == groups_by_scan(order, TinyLexicon(synsets, lemmas))
    assert max(map(len, groups)) > 2
