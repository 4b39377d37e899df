"""webdataset, reading our tars as they are.

Choices: shards are shuffled and dealt to the workers, samples go through a buffer of 1000 that
holds compressed bytes, and batches are made in the workers ("transferring individual samples is
slow", its documentation). The documented further step of unbatching, shuffling and batching again
in the main process mixes the workers' samples; it is left out, to webdataset's advantage.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import webdataset as wds
from torch import Tensor
from torchvision import transforms

from benchmarks.peers.batches import Batch, DecodeBatch, Settings, label_of


def make_loader(settings: Settings) -> Iterable[Batch]:
    """The loader of one variant; each pass is an epoch."""
    shards = sorted(str(path) for path in (settings.data / "webdataset").glob("*.tar"))
    if len(shards) < settings.workers:
        raise SystemExit(f"webdataset deals out whole shards: {len(shards)} are too few")
    dataset = wds.WebDataset(shards, shardshuffle=max(100, len(shards))).shuffle(1000)
    if settings.variant == "ours":
        dataset = dataset.batched(settings.batch_size, collation_fn=DecodeBatch(settings))
    else:
        dataset = (
            dataset.decode("pil")
            .to_tuple("jpg", "json")
            .map_tuple(Squash(settings.side), partial(label_of, attributes=settings.attributes))
            .batched(settings.batch_size)
        )
    loader: Iterable[Batch] = wds.WebLoader(dataset, batch_size=None, **settings.worker_options)
    return loader


class Squash:
    """PIL image to uint8 [S, S, 3]: torchvision's Resize and PILToTensor.

    ToTensor of the examples would make floats, four times the bytes; the axes are put back
    without a copy.
    """

    def __init__(self, side: int) -> None:
        self.transform = transforms.Compose(
            [transforms.Resize((side, side)), transforms.PILToTensor()]
        )

    def __call__(self, image: Any) -> Tensor:
        """The resized image."""
        pixels: Tensor = self.transform(image)
        return pixels.permute(1, 2, 0)
