"""Score files: CLIP similarities of the samples of one shard, bound to it by digests.

A file is safetensors (docs/formats.md) and is read whole (`read_shard_scores`) or memory-mapped
(`open_scores`): a map needs no file descriptor and only the memory of the pages that are read. Of a
remote file a local copy is made first, without the embeddings, which are most of it and of no use
for likelihoods.

Legend: n samples of the shard, S similarities, D embedding width.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors.numpy
from typing_extensions import TypedDict

from vlal_dist.contents import Count, Positive, Sha256, UidHex, parse_json, shown
from vlal_dist.data.hashing import I64, U64, uid_from_hex
from vlal_dist.errors import DataError, NotFoundError, bounded
from vlal_dist.method.likelihood import Float32
from vlal_dist.storage.checks import translated_errors
from vlal_dist.storage.local import replacing
from vlal_dist.storage.store import FETCH_BYTES, Store

FORMAT = 1
DIGESTS = ("shard_sha256", "scorer_digest", "feasible_digest", "vocabulary_digest")
_HEAD_BYTES = 1 << 16
"""First read of a file, for its header; those that `vlal score` writes have about 1 kB."""
_TYPES: dict[str, tuple[str, Any]] = {
    "uid": ("U64", np.uint64),
    "indptr": ("I64", np.int64),
    "similarity": ("F32", np.float32),
    "embedding": ("F32", np.float32),
}
LARGEST = 1.001
"""Of a similarity, which is at most 1 but for rounding."""
_MAPPED = ("uid", "indptr", "similarity")


class _SplitCounts(TypedDict):
    samples: Count
    shards: Count


class _Manifest(TypedDict):
    """`scores.json` (docs/formats.md)."""

    scorer_digest: str
    feasible_digest: Sha256
    vocabulary_digest: Sha256
    temperature: Positive
    splits: dict[str, _SplitCounts]


class _Entry(TypedDict):
    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


_Head = dict[str, _Entry | dict[str, str]]


@dataclass(frozen=True)
class ShardScores:
    """Scores of one shard, rows in the shard's order.

    Attributes:
        uid: uint64 [n].
        embedding: float32 [n, D], unit length.
        indptr: int64 [n + 1], where each row's similarities lie.
        similarity: float32 [S], cosine of the crop with the prompt of each feasible attribute of
            its object, ascending attribute id.
        header: `shard_sha256`, `scorer_digest`, `feasible_digest`, `vocabulary_digest` (hex),
            `temperature` (decimal text) and, where a crop could not be used, `quarantined` (JSON,
            uid in hex -> reason; see `quarantined_of`).
    """

    uid: U64
    embedding: npt.NDArray[np.float32]
    indptr: I64
    similarity: Float32
    header: dict[str, str]


@dataclass(frozen=True)
class MappedScores:
    """The similarities of one shard, on disk; attributes as in `ShardScores`."""

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
        shape: name -> shape of each array.
    """

    header: dict[str, str]
    place: dict[str, tuple[int, int]]
    shape: dict[str, list[int]]

    def array(self, name: str, data: Any) -> npt.NDArray[Any]:
        """An array in the file's bytes, not copied."""
        shape = self.shape[name]
        flat = np.frombuffer(data, _TYPES[name][1], prod(shape), self.place[name][0])
        return flat.reshape(shape)


def score_key(split: str, *, shard_sha256: str, scorer_digest: str) -> str:
    """Storage key of the score file of one shard and scorer: existence means done."""
    return f"{split}/{shard_sha256[:16]}-{scorer_digest[:16]}.safetensors"


def quarantined_of(header: Mapping[str, str]) -> dict[int, str]:
    """uid -> why its crop could not be scored; its similarities are all 0, its embedding too.

    Raises:
        DataError: the entry cannot be read.
    """
    found = parse_json(
        header.get("quarantined", "{}"),
        dict[UidHex, str],
        where="the list of unusable crops in a score file",
        remedy="delete the file and score again",
    )
    return {uid_from_hex(uid): why for uid, why in found.items()}


def encode_scores(scores: ShardScores) -> bytes:
    """Safetensors bytes; equal scores give equal bytes."""
    arrays = {name: getattr(scores, name) for name in ("uid", "embedding", "indptr", "similarity")}
    metadata = {"header": json.dumps(scores.header, sort_keys=True)}
    data: bytes = safetensors.numpy.save(arrays, metadata=metadata)
    return data


def decode_scores(data: bytes, *, where: str) -> ShardScores:
    """Read and check a score file.

    Args:
        data: the file.
        where: its name, for errors.

    Raises:
        DataError: damaged, a header without digests, or arrays that do not fit together.
    """
    layout = _read_layout(data, len(data), where)
    arrays = {name: layout.array(name, data).copy() for name in _TYPES}
    _check_indptr(arrays["indptr"], layout, where)
    if not np.abs(arrays["similarity"]).max(initial=0) <= LARGEST:  # a NaN is not
        raise _damaged(where, "a similarity lies outside [-1, 1]")
    if not np.isfinite(arrays["embedding"]).all():
        raise _damaged(where, "an embedding is not finite")
    return ShardScores(header=layout.header, **arrays)


def read_shard_scores(
    store: Store, split: str, *, shard_sha256: str, manifest: Mapping[str, Any]
) -> ShardScores:
    """The scores of one shard under the scorer that `scores.json` names.

    Raises:
        DataError: absent, damaged, or bound to another shard, scorer or feasible sets.
    """
    key = score_key(split, shard_sha256=shard_sha256, scorer_digest=str(manifest["scorer_digest"]))
    where = f"{store.url}/{key}"
    try:
        scores = decode_scores(store.read(key), where=where)
    except NotFoundError:
        raise _absent(where, split) from None
    _check_binding(scores.header, where, shard_sha256=shard_sha256, manifest=manifest)
    return scores


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
                raise _absent(where, split)
            _copy(store, key, path)
        with translated_errors(path):
            return _map(path, where, shard_sha256=shard_sha256, uid=uid, manifest=manifest)
    except DataError:
        if local is None:  # What failed a check is not kept: the next attempt copies it again.
            path.unlink(missing_ok=True)
        raise


def finished_manifest(store: Store) -> dict[str, Any]:
    """`scores.json` of a finished score root.

    Raises:
        DataError: scoring has not finished there, or in another format.
    """
    try:
        data = store.read("scores.json")
    except NotFoundError:
        raise DataError(
            f"{store.url} holds no scores.json: vlal score has not finished there; repeat it, "
            "or correct the path"
        ) from None
    where, remedy = f"{store.url}/scores.json", "restore it, or score again into a new root"
    manifest: dict[str, Any] = parse_json(data, dict[str, Any], where=where, remedy=remedy)
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{store.url}: scores format {shown(manifest.get('format'))}, expected {FORMAT}"
        )
    return parse_json(data, _Manifest, where=where, remedy=remedy)  # type: ignore[no-any-return]


def read_scores_manifest(
    store: Store, *, feasible_digest: str, vocabulary_digest: str
) -> dict[str, Any]:
    """`scores.json`, checked against the dataset it is to be used with.

    Raises:
        DataError: scoring has not finished, or was done with other feasible sets or vocabulary.
    """
    manifest = finished_manifest(store)
    for name, expected in (
        ("feasible_digest", feasible_digest),
        ("vocabulary_digest", vocabulary_digest),
    ):
        if manifest[name] != expected:
            raise DataError(
                f"{store.url}/scores.json: {name} {manifest[name]}, the dataset has {expected}; "
                "these scores belong to other feasible sets or names: run vlal score again "
                "into a new paths.scores"
            )
    return manifest


def write_scores_manifest(store: Store, manifest: Mapping[str, Any]) -> bool:
    """Commit `scores.json`, create-only; False when an equal one was there.

    Raises:
        ConflictError: another scorer already finished under this root.
    """
    text = json.dumps({"format": FORMAT, **manifest}, indent=2, sort_keys=True) + "\n"
    return store.create("scores.json", text.encode())


def _map(
    path: Path, where: str, *, shard_sha256: str, uid: U64, manifest: Mapping[str, Any]
) -> MappedScores:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        # Checked before it is mapped: to read a map past the end of its file is fatal (SIGBUS).
        layout = _read_layout(head, os.fstat(file.fileno()).st_size, where)
    with pa.memory_map(str(path)) as source:
        data = source.read_buffer()
    found, indptr, similarity = (layout.array(name, data) for name in _MAPPED)
    _check_binding(layout.header, where, shard_sha256=shard_sha256, manifest=manifest)
    _check_indptr(indptr, layout, where)
    if not np.array_equal(found, uid):
        raise DataError(
            f"{where}: {len(found)} samples that are not the {len(uid)} of shard "
            f"{shard_sha256[:16]}, in its order; delete that score file and score again"
        )
    return MappedScores(indptr, similarity, layout.header)


def _read_layout(head: bytes, size: int, where: str) -> _Layout:
    """Parse the first bytes of a safetensors file, and compare what they say with its size.

    Raises:
        DataError: no such layout, a header without digests, or the file is cut.
    """
    try:
        start = 8 + int.from_bytes(head[:8], "little")
        parsed = parse_json(head[8:start], _Head, where="it", remedy="score again")
        header = parse_json(
            parsed.pop("__metadata__")["header"], dict[str, str], where="it", remedy="score again"
        )
        entries: dict[str, _Entry] = {name: parsed[name] for name in _TYPES}
        if len(parsed) != len(entries):
            raise ValueError(f"arrays {shown(sorted(parsed))}")
        place, shape = {}, {name: entry["shape"] for name, entry in entries.items()}
        for name, entry in entries.items():
            low, high = entry["data_offsets"]
            size_bytes = prod(shape[name]) * np.dtype(_TYPES[name][1]).itemsize
            if not (0 <= low <= high and high - low == size_bytes):
                raise ValueError(f"{name} of shape {shape[name]} in {high - low} bytes")
            place[name] = (start + low, start + high)
        rows = {name: one[0] for name, one in shape.items()}
        fits = (
            rows["embedding"] == rows["uid"] == rows["indptr"] - 1
            and [len(shape[name]) for name in _TYPES] == [1, 1, 1, 2]
            and all(entries[name]["dtype"] == kind for name, (kind, _) in _TYPES.items())
        )
        missing = [name for name in DIGESTS if name not in header]
    except (KeyError, ValueError, IndexError) as error:
        raise _damaged(where, f"its header cannot be read: {bounded(repr(error))}") from None
    end = max(stop for _, stop in place.values())
    if end != size:
        raise _damaged(where, f"{size} bytes where {end} are stated")
    if not fits:
        raise _damaged(where, "its arrays do not fit together")
    if missing:
        raise _damaged(where, f"its header lacks {', '.join(missing)}")
    return _Layout(header, place, shape)


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
    with translated_errors(target), replacing(target) as unfinished, unfinished.open("xb") as file:
        file.write(head)
        file.truncate(size)
        for first, stop in (place[name] for name in _MAPPED):
            file.seek(first)
            for offset in range(first, stop, FETCH_BYTES):
                length = min(FETCH_BYTES, stop - offset)
                file.write(store.read(key, offset=offset, length=length))


def _check_binding(
    header: Mapping[str, str], where: str, *, shard_sha256: str, manifest: Mapping[str, Any]
) -> None:
    """Refuse scores of another shard, scorer, feasible sets or vocabulary."""
    for name in DIGESTS:
        expected = shard_sha256 if name == "shard_sha256" else str(manifest[name])
        if header[name] != expected:
            raise DataError(
                f"{where}: {name} {header[name]} where {expected} is expected; score again with "
                "the present dataset and model"
            )


def _check_indptr(indptr: I64, layout: _Layout, where: str) -> None:
    end = layout.shape["similarity"][0]
    if indptr[0] != 0 or indptr[-1] != end or (np.diff(indptr) < 0).any():
        raise _damaged(where, f"indptr does not rise from 0 to {end}")


def _damaged(where: str, what: str) -> DataError:
    return DataError(f"score file {where} is damaged ({what}); delete it and score again")


def _absent(where: str, split: str) -> DataError:
    return DataError(f"{where}: no scores of this shard; run vlal score for split {split}")
