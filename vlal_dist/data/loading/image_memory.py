"""Memory of images: reusable buffers of batches, and a cache of decoded images.

Legend: S image side, pixels.
"""

import threading
import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]


class ImageBuffers:
    """uint8 images [n, S, S, 3]; each buffer returns here when the last tensor on it is gone.

    Args:
        side: S, pixels.
        pinned: page-locked memory, for copies to a GPU that do not wait. torch's own pool then
            does the reuse: it knows when a copy has ended.
    """

    def __init__(self, *, side: int, pinned: bool) -> None:
        self._side, self._pinned = side, pinned
        self._lock = threading.Lock()
        self._free: list[Pixels] = []

    def take(self, count: int) -> tuple[Pixels, Tensor]:
        """Memory for `count` images: one array to write, and a tensor of the same memory."""
        if self._pinned:
            shape = (count, self._side, self._side, 3)
            tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return tensor.numpy(), tensor
        with self._lock:
            fitting = (n for n, buffer in enumerate(self._free) if len(buffer) >= count)
            number = next(fitting, None)
            buffer = None if number is None else self._free.pop(number)
        if buffer is None:
            buffer = np.empty((count, self._side, self._side, 3), dtype=np.uint8)
        view = buffer[:count]
        # torch keeps `view` alive as long as any tensor shares its memory.
        weakref.finalize(view, self._free.append, buffer).atexit = False
        return view, torch.from_numpy(view)


class ImageCache:
    """Decoded images by row of a corpus, uint8 [S, S, 3], kept from their first use up to a limit.

    Nothing is evicted: an epoch visits all rows once, so the least recently used image is the next
    one needed. May be shared by threads.

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
        self._place[row] = place  # only now, when it is complete
