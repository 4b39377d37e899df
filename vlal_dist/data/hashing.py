"""Keyed 64-bit hashes of our own: every order and draw of the stream is a function of these.

No library's generator is used, whose stream may change: what is keyed here is the same on every
machine and in every version, or no run could be resumed. What `clean` hides is keyed likewise.
"""

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# Purposes keep the hashes of different uses apart.
ORDER_OF_BLOCKS, ORDER_IN_WINDOW, FLIP, PHASE = 1, 2, 3, 4
HIDE_POSITIVES, HIDE_NEGATIVES = 5, 6

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(values: U64) -> U64:
    """The finaliser of splitmix64: a bijection on 64 bits, ours for good (no library's stream)."""
    x = values.astype(np.uint64, copy=True)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def keyed_hash(values: U64, *key: int) -> U64:
    """A 64-bit hash of each value under a key of integers; equal on every machine.

    Distinct values have distinct hashes under one key.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in key:
        state = mix(state + np.uint64((word * _GOLDEN + _GOLDEN) & _MASK))
    return mix(mix(values.astype(np.uint64, copy=False) + state) ^ state)


def uniform(uid: U64, visit: I64, *, seed: int, purpose: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (sample, visit), independent of any layout.

    Args:
        uid: uint64 [n].
        visit: int64 [n], running count of the sample's planned visits.
        seed: the run's seed.
        purpose: keeps different uses apart.
    """
    bits = keyed_hash(keyed_hash(uid, seed, purpose) + visit.astype(np.uint64), seed, purpose)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix_visits(uid: U64, visit: I64) -> U64:
    """What the ledger adds up: 64 well-mixed bits of each (sample, visit), uint64 [n].

    For one visit it is a bijection of the uid, so that a single missing sample can be named.
    """
    return mix(mix(uid) + visit.astype(np.uint64) * np.uint64(_GOLDEN))
