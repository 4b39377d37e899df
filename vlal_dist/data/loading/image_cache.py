"""Decoded images kept in memory, for data that fit: each is decoded once, not once an epoch."""

import threading

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class ImageCache:
    """uint8 images [S, S, 3] by row of a corpus, kept from their first use up to a limit.

    What came first stays: an epoch visits all rows once, where the least recently used one is
    always the next to be needed. Several threads may look and add.

    Args:
        side: S, pixels.
        num_rows: of the corpus.
        limit_bytes: of all kept pixels; 0 keeps none. Memory is taken as images come.
    """

    def __init__(self, *, side: int, num_rows: int, limit_bytes: int) -> None:
        places = min(num_rows, limit_bytes // (side * side * 3))
        self._pixels = np.empty((places, side, side, 3), dtype=np.uint8)
        self._place: dict[int, int] = {}
        self._lock, self._next = threading.Lock(), 0

    def __len__(self) -> int:
        return len(self._place)

    def get(self, row: int) -> Pixels | None:
        """The pixels of a row, to be read only; None where they are not kept."""
        place = self._place.get(row)
        return None if place is None else self._pixels[place]

    def keep(self, row: int, pixels: Pixels) -> None:
        """Copy the pixels of a row, if there is room."""
        with self._lock:
            place = self._next
            if place == len(self._pixels) or row in self._place:
                return
            self._next += 1
        self._pixels[place] = pixels
        self._place[row] = place  # only now: whoever finds it finds it whole
