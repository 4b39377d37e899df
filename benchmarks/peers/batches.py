"""What every peer must deliver, and the parts that their loaders share.

Legend: B samples of a batch, S image side in pixels, A attributes. A batch is the pair of a uint8
image [B, S, S, 3] and an int8 label [B, A]: +1 annotated present, -1 annotated absent, 0
unannotated. A stored sample is the pair that our tars hold: `jpg`, the crop's JPEG bytes, and
`json`, the bytes that list `positive` and `negative` attribute ids.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vlal_dist.data.loading.decode import decode_into

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """What a peer is asked to do.

    Attributes:
        data: the folder that `convert` wrote.
        variant: `ours` (our decode function) or `as_shipped` (what the peer's documentation does).
        side: S, pixels.
        attributes: A.
        batch_size: B.
        workers: worker processes; 0: the main process loads.
    """

    data: Path
    variant: str
    side: int
    attributes: int
    batch_size: int
    workers: int

    @property
    def folder(self) -> str:
        """Name of the converted folder: `ours` gets bytes, `as_shipped` the peer's JPEG type."""
        return "bytes" if self.variant == "ours" else "jpeg"

    @property
    def worker_options(self) -> dict[str, Any]:
        """Arguments of any of the peers' `DataLoader`s.

        Workers survive the epoch and run four batches ahead (the default of two leaves them idle
        while the main process is late); without a GPU, pinning would be a copy for nothing.
        """
        ahead = {"persistent_workers": True, "prefetch_factor": 4} if self.workers else {}
        return {"num_workers": self.workers, "pin_memory": False, **ahead}


def fill_label(meta: Mapping[str, Any], out: npt.NDArray[np.int8]) -> None:
    """Write +1 and -1 into a zeroed row [A]; negative wins a clash, as in our own batches."""
    out[meta["positive"]] = 1
    out[meta["negative"]] = -1


def label_of(meta: Mapping[str, Any], attributes: int) -> Tensor:
    """The label row int8 [A] of one sample (variant `as_shipped`)."""
    row = np.zeros(attributes, dtype=np.int8)
    fill_label(meta, row)
    return torch.from_numpy(row)


def parse(meta: Any) -> dict[str, Any]:
    """The `json` part; litdata hands over a view of its mapped chunk, which json refuses."""
    found: dict[str, Any] = json.loads(bytes(meta))
    return found


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; in a worker, in memory that the main process can map.

    torch's own `default_collate` does the same, and spares a copy of the batch.
    """
    if get_worker_info() is None:
        return torch.empty(*shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))


class DecodeBatch:
    """Variant `ours`: collate stored samples, each decoded by our function into its place.

    Runs where the peer collates, which is in the worker processes.
    """

    def __init__(self, settings: Settings) -> None:
        self.side, self.attributes = settings.side, settings.attributes

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of stored samples."""
        image = empty((len(samples), self.side, self.side, 3), torch.uint8)
        label = empty((len(samples), self.attributes), torch.int8).zero_()
        pixels, rows = image.numpy(), label.numpy()
        for place, sample in enumerate(samples):
            decode_into(sample["jpg"], pixels[place])
            fill_label(parse(sample["json"]), rows[place])
        return image, label
