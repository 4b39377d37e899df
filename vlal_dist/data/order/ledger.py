"""Ledger of visits: verifies that an epoch held every planned visit exactly once.

A ledger is (count, sum mod 2^64 of a mix of uid and visit). Ledgers of ranks, steps and restarts
add up in any order; the sum of an epoch must equal that of its plan, so that one visit too many or
too few is an error and not a slightly worse model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vlal_dist.data.hashing import I64, U64, mix_visits

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Ledger:
    """A multiset of visits, as a count and a sum.

    Attributes:
        count: number of visits.
        sum: sum over visits of `mix_visits`, modulo 2^64.
    """

    count: int = 0
    sum: int = 0

    @classmethod
    def of(cls, uid: U64, visit: I64) -> "Ledger":
        """The ledger of some visits: uid uint64 [n], visit int64 [n]."""
        return cls(len(uid), int(mix_visits(uid, visit).sum(dtype="uint64")))

    @classmethod
    def from_json(cls, values: Mapping[str, int]) -> "Ledger":
        """Undo `to_json`."""
        return cls(int(values["count"]), int(values["sum"]))

    def to_json(self) -> dict[str, int]:
        """Plain values."""
        return {"count": self.count, "sum": self.sum}

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(self.count + other.count, (self.sum + other.sum) & _MASK)

    def __sub__(self, other: "Ledger") -> "Ledger":
        return Ledger(self.count - other.count, (self.sum - other.sum) & _MASK)
