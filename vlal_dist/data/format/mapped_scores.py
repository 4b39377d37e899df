"""Score files read in place: any number of shards, at the memory of the pages that are looked at.

A file is checked once (its layout, its digests, its samples) and memory-mapped; the map needs no
file descriptor. Of a remote file a local copy is made first, without the embeddings, which are most
of it and of no use for likelihoods.

Legend: n samples of the shard, S similarities.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlal_dist.data.format.scores import absent_scores, check_binding, damaged_scores, score_key
from vlal_dist.data.hashing import I64, U64
from vlal_dist.errors import DataError
from vlal_dist.method.likelihood import Float32
from vlal_dist.storage.checks import TEMPORARY_PREFIX, translated_errors
from vlal_dist.storage.store import FETCH_BYTES, Store

_HEAD_BYTES = 1 << 16
"""Read of a file to find its header; those that score_clip writes have about 1 kB."""
_NEEDED = {
    "uid": ("U64", np.uint64),
    "indptr": ("I64", np.int64),
    "similarity": ("F32", np.float32),
}
_ITEM_BYTES = {"U64": 8, "I64": 8, "F32": 4}


@dataclass(frozen=True)
class MappedScores:
    """The similarities of one shard, on disk.

    Attributes:
        indptr: int64 [n + 1], where each row's similarities lie.
        similarity: float32 [S], as in `ShardScores`.
        header: of the file, as in `ShardScores`.
    """

    indptr: I64
    similarity: Float32
    header: dict[str, str]

    def row(self, place: int) -> Float32:
        """The similarities of the shard's sample `place`."""
        return self.similarity[self.indptr[place] : self.indptr[place + 1]]


@dataclass(frozen=True)
class _Layout:
    """What the head of a file says.

    Attributes:
        header: our own header, the digests.
        place: name -> first byte and end of each array in the file.
    """

    header: dict[str, str]
    place: dict[str, tuple[int, int]]


def open_scores(
    store: Store,
    split: str,
    *,
    shard_sha256: str,
    uid: U64,
    manifest: Mapping[str, Any],
    cache: Path,
) -> MappedScores:
    """Map the scores of one shard under the scorer that `scores.json` names.

    Args:
        store: the score root.
        split: name of the shard's split.
        shard_sha256: digest of the shard.
        uid: uint64 [n], its samples.
        manifest: the checked `scores.json`.
        cache: local folder for copies of remote files; may be shared by processes.

    Raises:
        DataError: absent, cut, damaged, or bound to another shard, scorer or feasible sets.
        StorageError: the file cannot be read or copied.
    """
    key = score_key(split, shard_sha256=shard_sha256, scorer_digest=str(manifest["scorer_digest"]))
    where, local = f"{store.url}/{key}", store.local_path(key)
    path = local or _copy_path(shard_sha256, manifest, cache)
    try:
        if not path.is_file():
            if local or not store.exists(key):
                raise absent_scores(where, split)
            _copy(store, key, path)
        with translated_errors(path):
            return _map(path, where, shard_sha256=shard_sha256, uid=uid, manifest=manifest)
    except DataError:
        if local is None:  # What failed a check is not kept: the next attempt copies it again.
            path.unlink(missing_ok=True)
        raise


def _map(
    path: Path, where: str, *, shard_sha256: str, uid: U64, manifest: Mapping[str, Any]
) -> MappedScores:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        # Checked before it is mapped: to read a map past the end of its file is fatal (SIGBUS).
        layout = _read_layout(head, os.fstat(file.fileno()).st_size, where)
    with pa.memory_map(str(path)) as source:
        data = source.read_buffer()
    arrays: dict[str, Any] = {}
    for name, (_, dtype) in _NEEDED.items():
        first, stop = layout.place[name]
        count = (stop - first) // np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(data, dtype, count, first)
    check_binding(layout.header, where, shard_sha256=shard_sha256, manifest=manifest)
    indptr, similarity = arrays["indptr"], arrays["similarity"]
    if indptr[0] != 0 or indptr[-1] != len(similarity) or (np.diff(indptr) < 0).any():
        raise damaged_scores(where, f"indptr does not rise from 0 to {len(similarity)}")
    if not np.array_equal(arrays["uid"], uid):
        raise DataError(
            f"{where}: {len(arrays['uid'])} samples that are not the {len(uid)} of shard "
            f"{shard_sha256[:16]}, in its order; delete that score file and score again"
        )
    return MappedScores(indptr, similarity, layout.header)


def _read_layout(head: bytes, size: int, where: str) -> _Layout:
    """Parse the first bytes of a safetensors file, and compare what they say with its size.

    Raises:
        DataError: no such layout, or the file is cut.
    """
    try:
        start = 8 + int.from_bytes(head[:8], "little")
        entries = json.loads(head[8:start])
        header = json.loads(entries.pop("__metadata__")["header"])
        place, kind, rows = {}, {}, {}
        for name, entry in entries.items():
            low, high = entry["data_offsets"]
            kind[name], rows[name] = entry["dtype"], entry["shape"][0]
            size_bytes = prod(entry["shape"]) * _ITEM_BYTES[kind[name]]
            if not (0 <= low <= high and high - low == size_bytes):
                raise ValueError(f"{name} of shape {entry['shape']} in {high - low} bytes")
            place[name] = (start + low, start + high)
        fits = rows["embedding"] == rows["uid"] == rows["indptr"] - 1 and all(
            kind[name] == dtype for name, (dtype, _) in _NEEDED.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise damaged_scores(where, f"its header cannot be read: {error!r}") from None
    end = max(stop for _, stop in place.values())
    if end != size:
        raise damaged_scores(where, f"{size} bytes where {end} are stated")
    if not fits:
        raise damaged_scores(where, "its arrays do not fit together")
    return _Layout(header, place)


def _copy_path(shard_sha256: str, manifest: Mapping[str, Any], cache: Path) -> Path:
    """Where the local copy of a remote file lies, named by all that determines its content."""
    names = ("scorer_digest", "feasible_digest", "vocabulary_digest")
    bound = "\0".join([shard_sha256, *(str(manifest[name]) for name in names)])
    return cache / "scores" / f"{hashlib.sha256(bound.encode()).hexdigest()}.safetensors"


def _copy(store: Store, key: str, target: Path) -> None:
    """Make the local copy of a remote score file; its embeddings are left a hole.

    Two processes may make it at once; both copies are whole and equal.
    """
    size = store.size(key)
    head = store.read(key, offset=0, length=min(size, _HEAD_BYTES))
    place = _read_layout(head, size, f"{store.url}/{key}").place
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with translated_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(head)
                file.truncate(size)
                for first, stop in (place[name] for name in _NEEDED):
                    file.seek(first)
                    for offset in range(first, stop, FETCH_BYTES):
                        length = min(FETCH_BYTES, stop - offset)
                        file.write(store.read(key, offset=offset, length=length))
                file.flush()
                # A name that is found is trusted, so the bytes must be on disk before it is.
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
