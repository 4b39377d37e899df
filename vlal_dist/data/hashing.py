"""Uids of samples, and keyed 64-bit hashes: every order and draw of training is a function of them.

The hashes are written here because the stream of a library's generator may change between versions,
and a run must be resumable on another machine years later. `clean` hides labels by the same hashes.
"""

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# Purposes keep the hashes of different uses apart.
ORDER_OF_BLOCKS, ORDER_IN_WINDOW, FLIP, PHASE = 1, 2, 3, 4
HIDE_POSITIVES, HIDE_NEGATIVES = 5, 6

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def text_hash(text: str) -> int:
    """The first 8 bytes of a text's sha256, as an unsigned integer."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def sample_uid(dataset_name: str, instance_id: str) -> int:
    """The unsigned 64-bit name of an instance (docs/formats.md)."""
    return text_hash(f"{dataset_name}\0{instance_id}")


def uid_to_hex(uid: int) -> str:
    """A uid as files and messages spell it: 16 hex digits. Takes int64 values of a batch too."""
    return f"{uid & _MASK:016x}"


def uid_from_hex(text: str) -> int:
    """The unsigned uid that `uid_to_hex` spelled."""
    return int(text, 16)


def signed_uids(uid: U64) -> I64:
    """uint64 as the int64 of the same bits: torch computes with no unsigned integers."""
    return uid.view(np.int64)


def unsigned_uids(uid: I64) -> U64:
    """The uint64 of the same bits, undoing `signed_uids`."""
    return uid.view(np.uint64)


def mix(values: U64) -> U64:
    """The finaliser of splitmix64: a bijection on 64 bits."""
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
    """64 well-mixed bits of each (sample, visit), which the ledger adds up: uint64 [n].

    For one visit it is a bijection of the uid, so that a single missing sample can be named.
    """
    return mix(mix(uid) + visit.astype(np.uint64) * np.uint64(_GOLDEN))
