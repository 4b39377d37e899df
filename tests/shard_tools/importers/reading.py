"""What an importer's generator yields, sorted by kind; for its tests."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from shard_tools.importers.records import Item, Notes, Record, Rejected
from vlal_dist.config.sections import ImportConfig

Read = Callable[[ImportConfig], Iterator[Item]]


class Found(NamedTuple):
    """Items by kind."""

    records: list[Record]
    rejected: list[Rejected]
    facts: dict[str, Any]
    settings: dict[str, Any]


def read_all(read: Read, **settings: Any) -> Found:
    """Run an importer on settings of the section `importing`."""
    found = Found([], [], {}, {})
    for item in read(ImportConfig(**settings)):
        if isinstance(item, Notes):
            found.facts.update(item.facts)
            found.settings.update(item.settings)
        elif isinstance(item, Record):
            found.records.append(item)
        else:
            found.rejected.append(item)
    return found


def reasons(found: Found) -> list[tuple[int, str]]:
    """Line and reason of each reject."""
    return [(one.line, one.reason) for one in found.rejected]
