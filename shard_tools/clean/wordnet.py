"""Merge object names by WordNet 3.0 (Sec. 3.1).

The authors merged object names with NLTK 3.7 over WordNet 3.0. Later NLTK versions strip one suffix
per call and so find other synsets; this module keeps the older rules, which the published counts
need, and reads `index.*`, `data.*` and `*.exc` directly (Debian: package wordnet-base).

Two names are similar when their first synset or their shortest noun lemma is equal. Names are taken
in order of first appearance, each into the first group with any similar member. Groups are never
joined later, so the result depends on the order; this is the rule, not an accident to repair.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from vlal_dist.errors import ConfigError

PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
"""Part of speech -> file suffix, in the order in which synsets are looked up."""

SUFFIX_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "n": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "v": (
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
    ),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}
"""Old suffix -> new suffix, tried in this order (WordNet's morphy)."""

_VERSION = "3.0"
_MARKER = re.compile(r"\([a-z]+\)$")  # syntactic marker of adjectives: "galore(ip)"
_REMEDY = (
    "install WordNet 3.0 (Debian: apt-get install wordnet-base) and set clean.wordnet_dir, "
    "or set clean.merge to table or none"
)


class WordNet:
    """WordNet 3.0 in memory: lemmas with their synset offsets, and irregular forms.

    Args:
        folder: holds index.*, data.* and *.exc.

    Raises:
        ConfigError: a file is missing or unreadable, or it is another WordNet version.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._check_version()
        self._offsets = {pos: self._read_index(pos) for pos in PARTS_OF_SPEECH}
        self._irregular = {pos: self._read_irregular(pos) for pos in PARTS_OF_SPEECH}

    def base_forms(self, word: str, pos: str) -> list[str]:
        """Lemmas of `word` for one part of speech, as NLTK 3.7's `_morphy`.

        Irregular forms decide alone where the word has any. Otherwise the word itself and all
        forms with one suffix replaced; only when none is a lemma, suffixes are stripped further.

        Args:
            word: looked up as it is; a space never matches (WordNet writes underscores).
            pos: `n`, `v`, `a` or `r`.
        """
        if word in self._irregular[pos]:
            return self._lemmas([word, *self._irregular[pos][word]], pos)
        forms = _replace_suffixes([word], pos)
        found = self._lemmas([word, *forms], pos)
        while forms and not found:
            forms = _replace_suffixes(forms, pos)
            found = self._lemmas(forms, pos)
        return found

    def first_synset(self, word: str) -> str | None:
        """Name (`track.n.09`) of the first synset over all parts of speech; None without one."""
        word = word.lower()
        for pos in PARTS_OF_SPEECH:
            for form in self.base_forms(word, pos):
                return self._synset_name(pos, self._offsets[pos][form][0])
        return None

    def shortest_noun_lemma(self, word: str) -> str:
        """The shortest noun lemma of `word` (the first of equally short ones), or `word` itself."""
        return min(self.base_forms(word, "n"), key=len, default=word)

    def _lemmas(self, forms: Sequence[str], pos: str) -> list[str]:
        return [form for form in dict.fromkeys(forms) if form in self._offsets[pos]]

    def _synset_name(self, pos: str, offset: int) -> str:
        """First lemma of the synset, its part of speech, and the synset's rank for that lemma."""
        with self._open(f"data.{PARTS_OF_SPEECH[pos]}") as file:
            file.seek(offset)
            fields = file.readline().decode("utf-8").split()
        # offset, lexicographer file, synset type, number of lemmas, first lemma ...
        kind, lemma = fields[2], _MARKER.sub("", fields[4]).lower()
        rank = self._offsets[pos][lemma].index(offset) + 1
        return f"{lemma}.{kind}.{rank:02d}"

    def _read_index(self, pos: str) -> dict[str, list[int]]:
        offsets = {}
        for line in self._read_lines(f"index.{PARTS_OF_SPEECH[pos]}"):
            if not line.startswith(" "):  # the licence is indented
                # lemma pos n_synsets n_pointers pointers... n_senses n_tagged offsets...
                fields = line.split()
                offsets[fields[0]] = [int(field) for field in fields[-int(fields[2]) :]]
        return offsets

    def _read_irregular(self, pos: str) -> dict[str, list[str]]:
        rows = (line.split() for line in self._read_lines(f"{PARTS_OF_SPEECH[pos]}.exc"))
        return {row[0]: row[1:] for row in rows if row}

    def _check_version(self) -> None:
        with self._open("data.noun") as file:
            head = file.read(2000).decode("utf-8", errors="replace")
        found = re.search(r"Word[Nn]et (\d+(?:\.\d+)?) Copyright", head)
        if found is None or found.group(1) != _VERSION:
            version = found.group(1) if found else "no version"
            raise ConfigError(
                f"clean.wordnet_dir {self._folder} holds {version}, but the merge of object names "
                f"is defined on WordNet {_VERSION}; {_REMEDY}"
            )

    def _read_lines(self, name: str) -> list[str]:
        with self._open(name) as file:
            return file.read().decode("utf-8").splitlines()

    def _open(self, name: str) -> BinaryIO:
        try:
            return (self._folder / name).open("rb")
        except OSError as error:
            raise ConfigError(
                f"clean.wordnet_dir {self._folder}: {name}: {error.strerror}; {_REMEDY}"
            ) from None


def _replace_suffixes(forms: Sequence[str], pos: str) -> list[str]:
    return [
        form[: -len(old)] + new
        for form in forms
        for old, new in SUFFIX_RULES[pos]
        if form.endswith(old)
    ]


def group_names(num_instances: Mapping[str, int], lexicon: WordNet) -> list[list[str]]:
    """Group similar names.

    Args:
        num_instances: object name -> instances, in order of first appearance.
        lexicon: gives synsets and lemmas.

    Returns:
        Groups in order of creation, members in order of appearance.
    """
    groups: list[list[str]] = []
    # The first group that holds a synset or a lemma; two look-ups replace a scan of all members.
    first_by_synset: dict[str, int] = {}
    first_by_lemma: dict[str, int] = {}
    for name in num_instances:
        synset = lexicon.first_synset(name) or name
        lemma = lexicon.shortest_noun_lemma(name)
        new = len(groups)
        group = min(first_by_synset.get(synset, new), first_by_lemma.get(lemma, new))
        if group == new:
            groups.append([])
        groups[group].append(name)
        first_by_synset[synset] = first_by_lemma[lemma] = group
    return groups


def merge_table(num_instances: Mapping[str, int], lexicon: WordNet) -> dict[str, str]:
    """Object name -> representative, for the names that change.

    The representative is the member with most instances, the earliest of equals.

    Args:
        num_instances: object name -> instances, in order of first appearance.
        lexicon: gives synsets and lemmas.
    """
    table = {}
    for members in group_names(num_instances, lexicon):
        representative = max(members, key=lambda name: num_instances[name])
        table.update({name: representative for name in members if name != representative})
    return table
