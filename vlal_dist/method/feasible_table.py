"""Sec. 2.2: the feasible sets Omega_o as one table, and its bytes on disk (`feasible.npz`).

How the sets come about is `feasible.py`'s matter. Numpy only, so that tools need no torch.

Shapes: O objects, A attributes, S total size of all sets. Sets are rows of a CSR matrix.
"""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vlal_dist.errors import DataError

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
            raise DataError(f"feasible sets: {problem}; run clean again")

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
    def from_npz(cls, data: bytes) -> "FeasibleSets":
        """Read `to_npz`'s bytes.

        Raises:
            DataError: not such an archive, a wrong dtype, or sets that break the rules above.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in _DTYPES}
        except Exception as error:  # a damaged zip raises many types, zlib's and struct's too
            raise DataError(f"feasible.npz cannot be read ({error}); run clean again") from None
        for name, dtype in _DTYPES.items():
            if arrays[name].dtype != np.dtype(dtype):
                raise DataError(
                    f"feasible.npz: {name} is {arrays[name].dtype}, it must be {dtype}; "
                    "run clean again"
                )
        return cls(**arrays)

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
