"""The WordNet reader against facts of NLTK 3.7 over WordNet 3.0 (notes on the cleaning)."""

from pathlib import Path

import pytest

from shard_tools.clean.wordnet import WordNet
from vlal_dist.errors import ConfigError

FOLDER = Path("/usr/share/wordnet")
needs_wordnet = pytest.mark.skipif(
    not (FOLDER / "index.noun").is_file(), reason="WordNet 3.0 (Debian: wordnet-base) is absent"
)


@pytest.fixture(scope="module")
def wordnet() -> WordNet:
    return WordNet(str(FOLDER))


@needs_wordnet
@pytest.mark.parametrize(
    ("word", "synset"),
    [
        ("rails", "track.n.09"),
        ("runway", "track.n.09"),
        ("men", "work_force.n.01"),
        ("spots", "musca_volitans.n.01"),
        ("glasses", "spectacles.n.01"),
        ("t-shirt", "jersey.n.03"),
        ("t-shirts", "jersey.n.03"),
        ("donut", "doughnut.n.02"),
        ("donuts", "doughnut.n.02"),
        ("doughnut", "ring.n.02"),
        ("doughnuts", "ring.n.02"),
        ("fridge", "electric_refrigerator.n.01"),
        ("refrigerator", "refrigerator.n.01"),
        ("bicycle", "bicycle.n.01"),
        ("grey", "grey.n.01"),
        ("gray", "gray.n.01"),
        ("Grey", "grey.n.01"),  # the look-up of synsets ignores case
    ],
)
def test_first_synset_of_likely_surprises(wordnet: WordNet, word: str, synset: str) -> None:
    assert wordnet.first_synset(word) == synset


@needs_wordnet
def test_equal_and_different_synsets(wordnet: WordNet) -> None:
    first = wordnet.first_synset
    assert first("couch") == first("sofa")
    assert first("tv") == first("television")
    assert first("people") != first("person")
    assert first("bike") == first("motorcycle") != first("bicycle")


@needs_wordnet
@pytest.mark.parametrize("name", ["teddy bear", "traffic light", "t shirt", "tee shirt", "zzgqx"])
def test_a_name_with_a_space_never_matches(wordnet: WordNet, name: str) -> None:
    assert wordnet.first_synset(name) is None
    assert wordnet.shortest_noun_lemma(name) == name


@needs_wordnet
@pytest.mark.parametrize(
    ("word", "lemma"),
    [
        ("glasses", "glass"),
        ("spots", "spot"),
        ("men", "men"),
        ("leaves", "leaf"),
        ("geese", "goose"),
    ],
)
def test_shortest_noun_lemma(wordnet: WordNet, word: str, lemma: str) -> None:
    assert wordnet.shortest_noun_lemma(word) == lemma


@needs_wordnet
def test_other_parts_of_speech_come_after_nouns(wordnet: WordNet) -> None:
    assert wordnet.first_synset("dressed") == "dress.v.01"
    assert wordnet.first_synset("galore") == "galore.s.01"  # written galore(ip) in data.adj
    assert wordnet.first_synset("quickly") == "quickly.r.01"


@needs_wordnet
def test_several_suffixes_are_stripped_only_when_nothing_else_matches(wordnet: WordNet) -> None:
    # NLTK 3.9 finds nothing here: it strips one suffix per call.
    assert wordnet.base_forms("dogss", "n") == ["dog"]
    assert wordnet.base_forms("dogs", "n") == ["dog"]


@needs_wordnet
def test_irregular_forms_decide_alone(wordnet: WordNet) -> None:
    # noun.exc: "axes ax axis"; the rules alone would also try "axe".
    assert wordnet.base_forms("axes", "n") == ["ax", "axis"]


def test_absent_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apt-get install wordnet-base"):
        WordNet(str(tmp_path / "nothing"))


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text("  1 WordNet 2.1 Copyright 2005\n")
    with pytest.raises(ConfigError, match=r"holds 2\.1, but .* WordNet 3\.0"):
        WordNet(str(tmp_path))
