"""Feasible attribute sets Omega_o of objects (Sec. 2.2), their file, and enlarged sets.

An attribute is feasible for object o when some instance of o is annotated with it, present or
absent: annotators only judge attributes that make sense. Numpy only, so that tools need no torch.

Shapes: N instances, O objects, A attributes, S total size of all sets, D embedding width. Sets are
rows of a CSR matrix.
"""

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlal_dist.errors import ConfigError, DataError, bounded

Ids = NDArray[np.integer]
LARGEST_GUESS = 1 << 24
"""Largest number of objects that `FeasibleSets.from_labels` takes from the ids alone."""
_BLOCK = 256  # objects whose neighbours are computed at once; bounds memory
_DTYPES = {
    "indptr": "<i8",
    "indices": "<i4",
    "positive_count": "<i4",
    "negative_count": "<i4",
}


@dataclass(frozen=True, eq=False)
class FeasibleSets:
    """Omega_o of every object.

    Attributes:
        indptr: int64 [O + 1]; set of object o is `indices[indptr[o]:indptr[o + 1]]`.
        indices: int32 [S], attribute ids, ascending within an object.
        positive_count: int32 [S], annotations `present` of (object, attribute).
        negative_count: int32 [S], annotations `absent`.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    positive_count: NDArray[np.int32]
    negative_count: NDArray[np.int32]

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise DataError(f"feasible sets: {problem}; run vlal clean again")

    @property
    def num_objects(self) -> int:
        """O."""
        return len(self.indptr) - 1

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the sets themselves; the counts are a record and do not enter."""
        content = hashlib.sha256(self.indptr.astype("<i8").tobytes())
        content.update(self.indices.astype("<i4").tobytes())
        return content.hexdigest()

    def of(self, object_id: int) -> NDArray[np.int32]:
        """Omega_o: int32 attribute ids, ascending."""
        return self.indices[self.indptr[object_id] : self.indptr[object_id + 1]]

    def locate(self, object_id: Ids, attribute_id: Ids) -> NDArray[np.int64]:
        """Places of pairs in their objects' sets.

        Args:
            object_id, attribute_id: integers [P], objects below O.

        Returns:
            int64 [P]: the pair is `indices[indptr[object_id] + place]`; -1: it is not feasible.
        """
        width = 1 + max(int(ids.max(initial=0)) for ids in (self.indices, attribute_id))
        objects = np.repeat(np.arange(self.num_objects), np.diff(self.indptr))
        pairs = objects * width + self.indices  # ascending, as the ids of an object are
        wanted = object_id.astype(np.int64) * width + attribute_id
        place = np.searchsorted(pairs, wanted)
        there = place < len(pairs)
        there[there] = pairs[place[there]] == wanted[there]
        found: NDArray[np.int64] = np.where(there, place - self.indptr[object_id], -1)
        return found

    def mask(self, num_attributes: int) -> NDArray[np.bool_]:
        """Bool [O, A]: whether the attribute is in Omega_o.

        Raises:
            DataError: a set names an attribute beyond A.
        """
        if len(self.indices) and int(self.indices.max()) >= num_attributes:
            raise DataError(
                f"feasible sets name attribute {self.indices.max()}, the vocabulary has "
                f"{num_attributes}; use the vocabulary.json written with them"
            )
        mask = np.zeros((self.num_objects, num_attributes), np.bool_)
        mask[np.repeat(np.arange(self.num_objects), np.diff(self.indptr)), self.indices] = True
        return mask

    def to_npz(self) -> bytes:
        """The four arrays as a numpy archive; equal sets give equal bytes."""
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
            for name, dtype in _DTYPES.items():
                array = io.BytesIO()
                np.lib.format.write_array(
                    array, getattr(self, name).astype(dtype), version=(1, 0), allow_pickle=False
                )
                # A fixed date and system: zipfile would otherwise write the clock and the host's.
                entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                entry.create_system = 3
                file.writestr(entry, array.getvalue())
        return archive.getvalue()

    @classmethod
    def from_labels(
        cls, object_id: Any, labels: Any, *, num_objects: int | None = None
    ) -> "FeasibleSets":
        """Omega_o of annotated instances (Sec. 2.2): what is annotated present or absent for o.

        Args:
            object_id: integers [N], numpy or torch.
            labels: [N, A] of any integer or float type: +1 present, -1 absent, 0 unannotated.
            num_objects: O; None: one more than the largest id, which is then below
                `LARGEST_GUESS`.

        Raises:
            DataError: shapes that do not fit, an id out of range, or a label that is not -1, 0 or
                1 (a ValueError).

        Example:
            >>> import vlal_dist as vlal
            >>> sets = vlal.FeasibleSets.from_labels([0, 1, 1], [[1, 0, 0], [0, -1, 0], [0, 0, 1]])
            >>> sets.of(1).tolist()
            [1, 2]
        """
        ids, label = as_array(object_id), checked_labels(as_array(labels))
        if label.ndim != 2 or ids.shape != label.shape[:1] or ids.dtype.kind not in "iu":
            raise DataError(
                f"object_id {ids.dtype} {ids.shape}, labels {label.shape}; give integers [N] and "
                "labels [N, A]"
            )
        if num_objects is None:
            num_objects = 1 + int(ids.max()) if len(ids) else 0
            if num_objects > LARGEST_GUESS:
                raise DataError(
                    f"object_id: {num_objects - 1} is the largest id; ids count from 0 without "
                    "gaps, and a set is made for each up to the largest. Number the objects from "
                    "0, or give num_objects if there are so many"
                )
        sides = {}
        for name, sign in (("positive", 1), ("negative", -1)):
            row, attribute = np.nonzero(label == sign)
            sides[f"{name}_indptr"] = np.searchsorted(row, np.arange(len(ids) + 1))
            sides[name] = attribute
        return feasible_sets(object_id=ids, num_objects=num_objects, **sides)

    @classmethod
    def from_npz(cls, data: bytes) -> "FeasibleSets":
        """Read `to_npz`'s bytes.

        Raises:
            DataError: not such an archive, a wrong dtype, or sets that break the rules above.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                arrays = {}
                for name, dtype in _DTYPES.items():
                    stored = _stored(file, f"{name}.npy", len(data))
                    arrays[name] = decode_npy(stored, dtype).copy()
        except Exception as error:  # a damaged zip raises many types, zlib's and struct's too
            raise DataError(
                f"feasible.npz cannot be read ({bounded(str(error))}); run vlal clean again"
            ) from None
        return cls(**arrays)

    def check_fits(self, num_objects: int, num_attributes: int) -> None:
        """A DataError unless there is a set for each object, of ids below `num_attributes`."""
        largest = int(self.indices.max(initial=-1))
        if self.num_objects != num_objects or largest >= num_attributes:
            raise DataError(
                f"feasible sets of {self.num_objects} objects and attribute ids up to {largest}, "
                f"the vocabulary has {num_objects} objects and {num_attributes} attributes; use "
                "the vocabulary.json written with them"
            )

    def _problem(self) -> str | None:
        """What is wrong with the arrays, if anything."""
        indptr, indices = self.indptr, self.indices
        if any(getattr(self, name).ndim != 1 for name in _DTYPES) or not len(indptr):
            return "an array is not one-dimensional, or indptr is empty"
        if not len(indices) == len(self.positive_count) == len(self.negative_count):
            return "indices and counts differ in length"
        if indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
            return f"indptr does not rise from 0 to {len(indices)}"
        rises = np.diff(indices.astype(np.int64)) > 0
        boundary = indptr[(indptr > 0) & (indptr < len(indices))] - 1
        rises[boundary] = True
        if not rises.all() or (indices < 0).any():
            return "the attribute ids of an object are not ascending and distinct"
        if (self.positive_count < 0).any() or (self.negative_count < 0).any():
            return "a count is negative"
        return None


_NPY = re.compile(
    rb"\x93NUMPY(?:\x01\x00v|\x02\x00t\x00\x00)\x00"
    rb"{'descr': '(<[fi][48])', 'fortran_order': False, "
    rb"'shape': \((\d+),\), } *\n"
)


def decode_npy(data: bytes | memoryview, dtype: str) -> NDArray[Any]:
    """A vector in numpy's file format, as this project writes it; not copied.

    The header is compared, not evaluated, and the length that it states with that of the data
    before anything is allocated. As numpy reads it takes 50 times as long.

    Raises:
        DataError: another header, dtype or length.
    """
    header = _NPY.match(data)
    if header is None or header[1] != dtype.encode():
        found = "no vector" if header is None else f"a vector of {header[1].decode()}"
        raise DataError(f"{found} in numpy's format where one of {dtype} is expected")
    stated, room = int(header[2]) * int(dtype[-1]), len(data) - header.end()
    if stated != room:
        raise DataError(f"a vector of {header[2].decode()} {dtype} in {room} bytes")
    return np.frombuffer(data, dtype, offset=header.end())


def _stored(file: zipfile.ZipFile, name: str, most: int) -> bytes:
    """An uncompressed member of a zip of `most` bytes."""
    info = file.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise ValueError(f"{name} is compressed, or states {info.file_size} bytes")
    return file.read(info)


def largest_num_ignore(mean_feasible: float) -> int:
    """The largest NUM_IGNORE that leaves three quarters of a mean feasible set to the loss.

    A rule of thumb (docs/your-data.md): the paper's 30 is for sets of VAW's size.
    """
    return int(mean_feasible / 4)


def feasible_sets(
    *,
    object_id: Ids,
    positive_indptr: Ids,
    positive: Ids,
    negative_indptr: Ids,
    negative: Ids,
    num_objects: int,
) -> FeasibleSets:
    """Omega_o: attributes annotated present or absent for at least one instance of o (Sec. 2.2).

    Instance i's annotations are ragged rows, such as the offsets and values of an Arrow list.

    Args:
        object_id: integers [N].
        positive_indptr: integers [N + 1], rows of `positive`.
        positive: attribute ids annotated present.
        negative_indptr: integers [N + 1], rows of `negative`.
        negative: attribute ids annotated absent.
        num_objects: O; an object without instances has an empty set.

    Returns:
        The sets, and how often each pair was annotated present and absent.

    Raises:
        DataError: rows do not fit, or an id is out of range.
    """
    if len(object_id) and not 0 <= int(object_id.min()) <= int(object_id.max()) < num_objects:
        raise DataError(f"object ids must lie in 0..{num_objects - 1}; run vlal clean again")
    num_attributes = 1 + max(
        (int(ids.max()) for ids in (positive, negative) if len(ids)), default=0
    )
    pairs, counts = [], []
    for indptr, ids in ((positive_indptr, positive), (negative_indptr, negative)):
        pair = _pairs(object_id, indptr, ids) * num_attributes + ids.astype(np.int64)
        unique, count = np.unique(pair, return_counts=True)
        pairs.append(unique)
        counts.append(count)
    return feasible_from_pairs(
        (pairs[0], counts[0]),
        (pairs[1], counts[1]),
        num_objects=num_objects,
        num_attributes=num_attributes,
    )


def feasible_from_pairs(
    positive: tuple[Ids, Ids], negative: tuple[Ids, Ids], *, num_objects: int, num_attributes: int
) -> FeasibleSets:
    """Omega_o from numbers of annotations (Sec. 2.2).

    Args:
        positive: distinct pairs `object id * A + attribute id` annotated present, ascending, and
            the number of annotations of each.
        negative: pairs annotated absent, in the same way.
        num_objects: O.
        num_attributes: A.
    """
    union = np.union1d(positive[0], negative[0]).astype(np.int64, copy=False)
    tables = np.zeros((2, len(union)), np.int32)
    for table, (unique, count) in zip(tables, (positive, negative), strict=True):
        table[np.searchsorted(union, unique)] = count
    return FeasibleSets(
        indptr=_indptr(union // max(num_attributes, 1), num_objects),
        indices=(union % max(num_attributes, 1)).astype(np.int32),
        positive_count=tables[0],
        negative_count=tables[1],
    )


def as_array(values: Any) -> NDArray[Any]:
    """An array of numpy's, also of a torch tensor."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":  # which numpy does not know
            values = values.float()
    return np.asarray(values)


def checked_labels(label: NDArray[Any]) -> NDArray[np.int8]:
    """Three-valued labels as int8.

    Raises:
        DataError: a value is not -1, 0 or 1, or the type is bool, in which 0 would be unannotated.
    """
    code: NDArray[np.int8] = label
    if label.dtype != np.int8:
        if label.dtype.kind not in "iuf":
            raise DataError(f"labels: {label.dtype}; give integers: +1, -1, and 0 for unannotated")
        with np.errstate(invalid="ignore"):  # NaN, which the comparison refuses
            code = label.astype(np.int8)
    if (code != label).any() or (code > 1).any() or (code < -1).any():
        raise DataError("labels: a value is not -1 (absent), 0 (unannotated) or +1 (present)")
    return code


def enlarge_feasible_sets(
    feasible: FeasibleSets, *, object_vectors: NDArray[np.floating], top_k: int, votes: int
) -> FeasibleSets:
    """Omega_o enlarged by the sets of similar objects (authors' configuration kn-KT, Sec. 2.2).

    Two lists of neighbours: by cosine of the sets themselves and by cosine of `object_vectors`.
    Of each, the `top_k` nearest, the object itself being the first and then skipped, vote for
    their attributes; attributes with at least `votes` votes join, with counts 0. Ties go to the
    lower object id; a neighbour whose cosine is not positive has no vote.

    Args:
        feasible: sets from co-occurrence.
        object_vectors: float [O, D], embeddings of the objects' names, any length.
        top_k: K >= 1 (kn-32: 3).
        votes: T >= 1 (kn-32: 2).

    Raises:
        ConfigError: K or T is below 1.
        DataError: the vectors do not fit the objects.
    """
    if top_k < 1 or votes < 1:
        raise ConfigError(f"top_k is {top_k} and votes {votes}; both must be 1 or more")
    num_objects = feasible.num_objects
    if object_vectors.shape[:1] != (num_objects,) or not np.isfinite(object_vectors).all():
        raise DataError(
            f"object vectors: {object_vectors.shape[0]} rows for {num_objects} objects, or not "
            "all finite; write them again for the present vocabulary"
        )
    num_attributes = 1 + int(feasible.indices.max(initial=0))
    mask = feasible.mask(num_attributes)
    joined = mask.copy()
    for start in range(0, num_objects, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, num_objects))
        count = np.zeros((len(rows), num_attributes), np.int64)
        for vectors in (mask, object_vectors):
            neighbours, positive = _nearest(vectors, rows, top_k)
            count += (mask[neighbours] & positive[:, :, None]).sum(axis=1)
        joined[rows] |= count >= votes
    object_id, indices = np.nonzero(joined)
    own = mask[object_id, indices]
    tables = np.zeros((2, len(indices)), np.int32)
    tables[0, own], tables[1, own] = feasible.positive_count, feasible.negative_count
    return FeasibleSets(
        indptr=_indptr(object_id, num_objects),
        indices=indices.astype(np.int32),
        positive_count=tables[0],
        negative_count=tables[1],
    )


def _nearest(
    vectors: NDArray[np.generic], rows: Ids, top_k: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The top_k - 1 objects nearest to each row, itself left out, and whether the cosine is > 0.

    A row's own length does not change its order, so only the others' divide: for sets the
    products are then exact integers and equal sets tie exactly.
    """
    values = vectors.astype(np.float64)
    length = np.sqrt((values * values).sum(axis=1))
    similarity = (values[rows] @ values.T) / np.where(length > 0, length, 1.0)
    similarity[np.arange(len(rows)), rows] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, : top_k - 1]
    return order, np.take_along_axis(similarity, order, axis=1) > 0


def _pairs(object_id: Ids, indptr: Ids, ids: Ids) -> NDArray[np.int64]:
    """The object of each annotation."""
    ends = indptr.astype(np.int64)
    lengths = ends[1:] - ends[:-1]
    fits = len(lengths) == len(object_id) and indptr[0] == 0 and indptr[-1] == len(ids)
    if not fits or (lengths < 0).any() or (len(ids) and int(ids.min()) < 0):
        raise DataError("annotations: ragged rows do not fit the instances; run vlal clean again")
    return np.repeat(object_id.astype(np.int64), lengths)


def _indptr(object_id: NDArray[np.int64], num_objects: int) -> NDArray[np.int64]:
    """Row starts of ascending object ids."""
    count = np.bincount(object_id, minlength=num_objects)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(count, dtype=np.int64)])
