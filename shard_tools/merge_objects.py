"""Merge object names by WordNet: greedy grouping of Sec. 3.1, as in the authors' notebook.

Two names are similar when their first synset or their shortest noun lemma is equal. Names are taken
in order of first appearance, each into the first group with any similar member. Groups are never
joined later, so the result depends on the order; this is the rule, not an accident to repair.
"""

from collections.abc import Mapping
from typing import Protocol


class Lexicon(Protocol):
    """What the merge asks of a dictionary (`wordnet.WordNet`)."""

    def first_synset(self, word: str) -> str | None:
        """Name of the first synset, None without one."""

    def shortest_noun_lemma(self, word: str) -> str:
        """Shortest noun lemma, or the word itself."""


def group_names(num_instances: Mapping[str, int], lexicon: Lexicon) -> list[list[str]]:
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
        first_by_synset[synset] = min(first_by_synset.get(synset, group), group)
        first_by_lemma[lemma] = min(first_by_lemma.get(lemma, group), group)
    return groups


def merge_table(num_instances: Mapping[str, int], lexicon: Lexicon) -> dict[str, str]:
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
