"""Samples of tars that others wrote: members of one key, which webdataset expects to be adjacent.

webdataset and `tarfile` end quietly at a damaged header; a listing names what is damaged.
"""

import re
from dataclasses import dataclass, field

from vlal_dist.data.format.photo_names import MemberIndex, printable
from vlal_dist.data.format.photo_tars import Tar
from vlal_dist.data.format.tar import BLOCK, ForeignMember
from vlal_dist.errors import DataError
from vlal_dist.storage.store import FETCH_BYTES

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""webdataset's rule for a member's name: the key ends at the first dot of its last part."""


@dataclass
class TarSample:
    """Adjacent members of one key.

    Attributes:
        key: as webdataset has it.
        start, end: of their range in the tar, headers and padding included, bytes.
        members: their numbers in the listing.
        suffixes: of their names, in lower case.
    """

    key: str
    start: int
    end: int
    members: list[int] = field(default_factory=list)
    suffixes: list[str] = field(default_factory=list)


@dataclass
class Listing:
    """What a tar holds.

    Attributes:
        names: leads from a name to the number of a member.
        members: regular files, in order.
        sample: of each member, the sample that it belongs to; None: its name has no key.
        samples: in order.
        repeated: keys whose members lie in several places.
        damage: why members may be missing at the end; empty: the tar is whole.
    """

    names: MemberIndex
    members: list[ForeignMember] = field(default_factory=list)
    sample: list[TarSample | None] = field(default_factory=list)
    samples: list[TarSample] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)
    damage: str = ""


def list_samples(tar: Tar) -> Listing:
    """The members and samples of a tar. Damage ends the listing, and is named in it."""
    found, seen = Listing(MemberIndex([tar.name])), set[str]()
    end, current = 0, None
    try:
        for member in tar.members():
            start, end = end, member.offset + member.size + -member.size % BLOCK
            if member.kind:
                continue
            named = _KEY.fullmatch(member.name)
            if named is not None and (current is None or current.key != named[1]):
                current = TarSample(named[1], start, end)
                found.samples.append(current)
                if named[1] in seen:
                    found.repeated.add(named[1])
                seen.add(named[1])
            if named is not None and current is not None:
                current.end = end
                current.members.append(len(found.members))
                current.suffixes.append(named[2].lower())
            found.names.add(0, member.name, len(found.members), 0)
            found.members.append(member)
            found.sample.append(current if named else None)
    except DataError as error:
        found.damage = str(error)
    else:
        found.damage = _trailing(tar, end)
    return found


def _trailing(tar: Tar, end: int) -> str:
    """What is wrong behind the last member: no end, or bytes that a reader of tars never sees."""
    if tar.size_bytes < end + 2 * BLOCK:
        return f"{printable(tar.url)} ends at byte {tar.size_bytes} without the end of a tar"
    for offset in range(end, tar.size_bytes, FETCH_BYTES):
        if tar.read(offset, min(FETCH_BYTES, tar.size_bytes - offset)).strip(b"\0"):
            return f"{printable(tar.url)} has data behind its end at byte {end}"
    return ""
