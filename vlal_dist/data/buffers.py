"""Memory of batches, allocated once and used again: fresh pages cost more than a small decode."""

import threading
import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class ImageBuffers:
    """uint8 images [n, S, S, 3]; each buffer returns here when the last tensor on it is gone.

    Args:
        side: S, pixels.
        pinned: page-locked memory, for copies to a GPU that do not wait. torch's own pool then
            does the reuse: it knows when a copy is over.
    """

    def __init__(self, *, side: int, pinned: bool) -> None:
        self._side, self._pinned = side, pinned
        self._lock = threading.Lock()
        self._free: list[npt.NDArray[np.uint8]] = []

    def take(self, count: int) -> tuple[npt.NDArray[np.uint8], Tensor]:
        """Memory for `count` images: the same as an array to write and a tensor to hand on."""
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
