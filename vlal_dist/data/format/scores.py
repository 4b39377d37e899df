"""Score files: what CLIP said of each sample of one shard, bound to shard and scorer by digest."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from vlal_dist.data.hashing import uid_from_hex
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.storage.store import Store

FORMAT = 1
DIGESTS = ("shard_sha256", "scorer_digest", "feasible_digest", "vocabulary_digest")


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

    uid: npt.NDArray[np.uint64]
    embedding: npt.NDArray[np.float32]
    indptr: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float32]
    header: dict[str, str]


def score_key(split: str, *, shard_sha256: str, scorer_digest: str) -> str:
    """Storage key of the score file of one shard and scorer: existence means done."""
    return f"{split}/{shard_sha256[:16]}-{scorer_digest[:16]}.safetensors"


def encode_scores(scores: ShardScores) -> bytes:
    """Safetensors bytes; equal scores give equal bytes."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "uid": scores.uid,
        "embedding": scores.embedding,
        "indptr": scores.indptr,
        "similarity": scores.similarity,
    }
    data: bytes = safetensors.numpy.save(
        arrays, metadata={"header": json.dumps(scores.header, sort_keys=True)}
    )
    return data


def decode_scores(data: bytes, *, where: str) -> ShardScores:
    """Read and check a score file.

    Args:
        data: the file.
        where: its name, for errors.

    Raises:
        DataError: damaged, a header without digests, or arrays that do not fit together.
    """
    try:
        arrays = safetensors.numpy.load(data)
        header = json.loads(_metadata(data)["header"])
        scores = ShardScores(header=header, **arrays)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged_scores(where, str(error)) from None
    rows = len(scores.uid)
    fits = (
        scores.embedding.ndim == 2
        and len(scores.embedding) == rows
        and len(scores.indptr) == rows + 1
        and int(scores.indptr[-1]) == len(scores.similarity)
    )
    if not fits:
        raise damaged_scores(where, "its arrays do not fit together")
    check_header(header, where)
    return scores


def quarantined_of(header: Mapping[str, str]) -> dict[int, str]:
    """uid -> why its crop could not be scored; its similarities are all 0, its embedding too."""
    found: dict[str, str] = json.loads(header.get("quarantined", "{}"))
    return {uid_from_hex(uid): why for uid, why in found.items()}


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
        raise absent_scores(where, split) from None
    check_binding(scores.header, where, shard_sha256=shard_sha256, manifest=manifest)
    return scores


def check_binding(
    header: Mapping[str, str], where: str, *, shard_sha256: str, manifest: Mapping[str, Any]
) -> None:
    """Refuse scores of another shard, scorer, feasible sets or vocabulary.

    Args:
        header: the score file's own.
        where: its name, for errors.
        shard_sha256: digest of the shard.
        manifest: the checked `scores.json`.

    Raises:
        DataError: a digest is absent or another one.
    """
    check_header(header, where)
    for name in DIGESTS:
        expected = shard_sha256 if name == "shard_sha256" else str(manifest[name])
        if header[name] != expected:
            raise DataError(
                f"{where}: {name} {header[name]} where {expected} is expected; score again with "
                "the present dataset and model"
            )


def check_header(header: Mapping[str, str], where: str) -> None:
    """Raise a DataError when a score file's header lacks a digest."""
    missing = [name for name in DIGESTS if name not in header]
    if missing:
        raise DataError(
            f"score file {where}: header lacks {', '.join(missing)}; delete it and score again"
        )


def damaged_scores(where: str, what: str) -> DataError:
    """The error for a score file that cannot be used."""
    return DataError(f"score file {where} is damaged ({what}); delete it and score again")


def absent_scores(where: str, split: str) -> DataError:
    """The error for a shard that was not scored."""
    return DataError(f"{where}: no scores of this shard; run score_clip for split {split}")


def finished_manifest(store: Store) -> dict[str, Any]:
    """`scores.json` of a finished score root.

    Raises:
        DataError: scoring has not finished there, or in another format.
    """
    try:
        manifest: dict[str, Any] = json.loads(store.read("scores.json"))
    except NotFoundError:
        raise DataError(
            f"{store.url} holds no scores.json: score_clip has not finished there; run it again, "
            "or correct the path"
        ) from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{store.url}: scores format {manifest.get('format')}, expected {FORMAT}")
    return manifest


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
                "these scores belong to other feasible sets or names: run score_clip again "
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


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return metadata
