"""litdata, reading an optimised dataset in place.

Choices: its own StreamingDataLoader, `shuffle=True` (chunk order, and items in windows of 256
inside a chunk), its default memory-mapped reading of local chunks. Items are deserialised one at a
time, its default for images: for plain bytes it would take 256 together, and then a worker whose
part of a chunk does not begin at a multiple of 256 does so twice over, which cost two thirds of
the speed. `as_shipped` stores its JPEG type, which it decodes with torchvision's `decode_jpeg`,
and resizes the tensor through its `transform` argument.
"""

from collections.abc import Iterable
from typing import Any

import litdata
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.peers.batches import Batch, DecodeBatch, Settings, label_of, parse


def make_loader(settings: Settings) -> Iterable[Batch]:
    """The loader of one variant; each pass is an epoch."""
    ours = settings.variant == "ours"
    dataset = litdata.StreamingDataset(
        str(settings.data / "litdata" / settings.folder),
        shuffle=True,
        batch_decode=1,
        transform=None if ours else Squash(settings.side, settings.attributes),
    )
    loader: Iterable[Batch] = litdata.StreamingDataLoader(
        dataset,
        batch_size=settings.batch_size,
        collate_fn=DecodeBatch(settings) if ours else None,
        **settings.worker_options,
    )
    return loader


class Squash:
    """A decoded sample to uint8 [S, S, 3] and int8 [A]; the axes are put back without a copy."""

    def __init__(self, side: int, attributes: int) -> None:
        self.resize = v2.Resize((side, side), antialias=True)
        self.attributes = attributes

    def __call__(self, sample: dict[str, Any], *_: Any) -> Batch:
        """Image and label."""
        pixels: Tensor = self.resize(sample["jpg"])
        return pixels.permute(1, 2, 0), label_of(parse(sample["json"]), self.attributes)
