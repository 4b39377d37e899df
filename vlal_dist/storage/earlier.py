"""Remove an earlier output of a program from its root, for `--replace`.

Only files that the program wrote go: their names must be names that it gives, and the root must
prove that it was this program that wrote here. What lies beside them stays, and is named. Links are
removed and not followed. Killed at any moment, the root shows no finished output, or an error of
absent files, and the same call completes the removal.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from vlal_dist.contents import parse_json
from vlal_dist.errors import bounded
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)

STATUS = re.compile(r"([^/]+/)*[a-z_]+\.(result\.json|config\.yaml|replacing\.json)")
"""Keys that the runner of programs writes into any root."""


@dataclass(frozen=True, slots=True)
class Owned:
    """What a program writes in its root.

    Attributes:
        keys: regular expression of all keys that it writes, whole.
        last: the key that it writes after all others.
        first: the key that it writes before all others, which proves that the others are its own;
            empty: it writes none, and `last` lists its files under `files`.
    """

    keys: str
    last: str
    first: str = ""


class _Listed(TypedDict):
    """What is read of a manifest."""

    files: dict[str, Any]


def remove_earlier(store: Store, owned: Owned, *, program: str, inputs: Any) -> None:
    """Remove what a program wrote in a root, but not what an interrupted call left to continue.

    Leaves the key `PROGRAM.replacing.json` with the inputs; `forget_replacing` removes it when the
    new output is finished. While it is there, and the inputs are the same, what lies in the root
    was written since, and is kept.

    Args:
        store: the root; the caller is its one writer.
        owned: what the program writes.
        program: its short name.
        inputs: what decides the new output, as JSON values; None: not known, nothing is continued.

    Raises:
        DataError: a damaged list of files.
        StorageError: the root cannot be read or written.
    """
    mark, keys = f"{program}.replacing.json", store.list_keys()
    mine = [key for key in keys if re.fullmatch(owned.keys, key)]
    marked = mark in keys
    text = (json.dumps({"inputs": inputs}, sort_keys=True) + "\n").encode()
    if marked and inputs is not None and owned.last not in keys and store.read(mark) == text:
        logger.info("%s: continuing an interrupted --replace", store.url)
        return
    if marked or owned.first in mine:
        order = {owned.last: 0, owned.first: 2}
        doomed = sorted(mine, key=lambda key: order.get(key, 1))
    elif owned.last in mine and not owned.first:
        listed = _files(store, owned.last)
        doomed = [key for key in mine if key in listed and key != owned.last] + [owned.last]
    else:
        doomed = []
    for key in doomed:
        store.delete(key)
    for folder in sorted({key.partition("/")[0] for key in doomed if "/" in key}):
        store.sweep(folder)
    if doomed:
        logger.info("%s: removed %d files of an earlier %s", store.url, len(doomed), program)
    left = [key for key in keys if key not in set(doomed)]
    _name_left(store, left, mine, program)
    if len(doomed) == len(mine):  # else the mark would prove what it cannot know
        store.replace(mark, text)


def forget_replacing(store: Store, *, program: str) -> None:
    """Remove the mark of `remove_earlier`, when the new output is finished."""
    store.delete(f"{program}.replacing.json")


def _files(store: Store, key: str) -> set[str]:
    """Keys that a manifest lists."""
    where, remedy = f"{store.url}/{key}", "remove it by hand, or give another root"
    listed: _Listed = parse_json(store.read(key), _Listed, where=where, remedy=remedy)
    return set(listed["files"])


def _name_left(store: Store, left: Sequence[str], mine: Sequence[str], program: str) -> None:
    """Name what stays in the root."""
    for why, some in (
        (f"{program} does not write such files", [key for key in left if key not in mine]),
        (
            f"nothing shows that {program} wrote them; remove them if they are not needed",
            [key for key in left if key in mine],
        ),
    ):
        some = [key for key in some if not STATUS.fullmatch(key)]
        if some:
            named = ", ".join(bounded(key, most=80) for key in some[:5])
            more = f" and {len(some) - 5} more" if len(some) > 5 else ""
            logger.warning("%s: left as they are: %s%s (%s)", store.url, named, more, why)
