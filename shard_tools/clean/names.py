"""What a name may be, and names of the settings compared with those of the annotations.

A name in a setting that matches nothing is an error where a wrong dataset would follow (a sensitive
attribute would stay), and otherwise a warning that names it.
"""

import difflib
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from vlal_dist.errors import ConfigError, DataError
from vlal_dist.remarks import remark

LONGEST_NAME = 1000
"""Characters of a name or id; CLIP reads 77 tokens."""

SHOWN = 5
"""Names that a message lists."""

logger = logging.getLogger(__name__)


def name_problem(value: object) -> str | None:
    """Why a value of an annotation file is not a name; None where it is one.

    A name is a text of 1 to `LONGEST_NAME` characters that is not blank, without control characters
    and valid Unicode (JSON can hold lone surrogates, Parquet cannot; bytes of a file that are not
    UTF-8 arrive here as such surrogates).
    """
    if not isinstance(value, str):
        return "not a text"
    if not value or value.isspace():
        return "blank"
    if len(value) > LONGEST_NAME:
        return f"{len(value)} characters, at most {LONGEST_NAME}"
    if value.isprintable():  # true of nearly all names, and fast
        return None
    for character in value:
        category = unicodedata.category(character)
        if category == "Cs":
            return "not Unicode text (the file is not UTF-8, or holds half a surrogate pair)"
        if category == "Cc":
            return f"holds the control character U+{ord(character):04X}"
    return None


def normalized(name: str) -> str:
    """A name without regard to case, blanks and ways of encoding it (Unicode NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", name).split()).casefold()


def matching(names: Iterable[str], wanted: Iterable[str]) -> set[str]:
    """Those of `names` that are equal to one of `wanted` after `normalized`."""
    keys = {normalized(name) for name in wanted}
    return {name for name in names if normalized(name) in keys}


def listed(names: Iterable[str]) -> str:
    """The first names in quotes, for messages; `...` where there are more."""
    shown = [repr(name) if len(name) <= 60 else f"{name[:57]!r}..." for name in names]
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")


def check_deleted(deleted: Sequence[str], attributes: Collection[str], *, strict: bool) -> None:
    """Refuse names of `clean.deleted_attributes` that no annotation holds.

    Args:
        deleted: the setting.
        attributes: names in the annotations.
        strict: False where a vocabulary is given (`--like`), so that no other attribute can stay:
            then it is a warning.

    Raises:
        ConfigError: naming them, and the nearest names of the annotations.
    """
    known = {normalized(name) for name in attributes}
    absent = [name for name in dict.fromkeys(deleted) if normalized(name) not in known]
    if absent:
        text = (
            f"clean.deleted_attributes: {len(absent)} of {len(set(deleted))} names are no "
            f"attribute of the annotations: {_with_nearest(absent, attributes)}"
        )
        if strict:
            raise ConfigError(f"{text}; correct the names, or take them off the list")
        logger.warning("%s; they delete nothing", text)
    more = sorted(matching(attributes, deleted) - set(deleted))
    if more:
        logger.info("clean.deleted_attributes also deletes, spelled otherwise: %s", listed(more))


def check_table(
    table: Mapping[str, str], *, what: str, error: type[ConfigError] | type[DataError]
) -> None:
    """Refuse a table of names that has an unusable name, a chain or a circle.

    Args:
        table: name -> the name that replaces it, in one step; a name may stand for itself.
        what: the config key or file, for messages.
        error: what is raised; it names the entry.
    """
    for name, target in table.items():
        problem = name_problem(target)
        if problem is not None:
            raise error(
                f"{what}: {listed([name])} becomes {listed([target])}, which is no name "
                f"({problem}); give the new name, or remove the entry"
            )
        further = table.get(target, target)
        if target not in (name, further):
            raise error(
                f"{what}: {listed([name])} becomes {listed([target])}, which itself becomes "
                f"{listed([further])}; names are replaced once: give every name its last "
                "replacement, and none that is replaced"
            )


def warn_of_unused_names(
    used: Iterable[str], known: Collection[str], *, setting: str, kind: str, follows: str
) -> None:
    """Log the names of a setting that match nothing.

    Args:
        used: the names of the setting.
        known: what they may be.
        setting: the config key.
        kind: what they should name, such as `object of the annotations`.
        follows: what becomes of them.
    """
    names = list(dict.fromkeys(used))
    absent = [name for name in names if name not in known]
    if absent:
        remark(
            logger,
            setting,
            "%s: %d of %d names are no %s: %s; %s",
            setting,
            len(absent),
            len(names),
            kind,
            _with_nearest(absent, known),
            follows,
        )


def warn_of_alike_names(names: Iterable[str], *, kind: str) -> None:
    """Log names that differ only in case, blanks or encoding: they count as different names."""
    groups = defaultdict(list)
    for name in sorted(names):
        groups[normalized(name)].append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    if alike:
        logger.warning(
            "%d %s names differ from others only in case, blanks or encoding, and count as "
            "different ones: %s; write each name in one way if they are the same",
            sum(map(len, alike)),
            kind,
            listed(name for group in alike for name in group),
        )
    blanks = [group[0] for group in groups.values() if len(group) == 1 and _has_blanks(group[0])]
    if blanks:
        logger.warning(
            "%d %s names begin or end with blanks, which are kept: %s",
            len(blanks),
            kind,
            listed(blanks),
        )


def _has_blanks(name: str) -> bool:
    return name != name.strip()


def _with_nearest(absent: Sequence[str], known: Collection[str]) -> str:
    """The first absent names, each with the nearest known one if one is near."""
    keys = {normalized(name): name for name in sorted(known, reverse=True)}
    shown = []
    for name in absent[:SHOWN]:
        near = difflib.get_close_matches(normalized(name)[:100], keys, n=1, cutoff=0.7)
        hint = f" (near: {listed([keys[near[0]]])})" if near else ""
        shown.append(f"{listed([name])}{hint}")
    return ", ".join(shown) + (", ..." if len(absent) > SHOWN else "")
