"""mosaicml-streaming, reading an MDS dataset that lies here (`local`, no `remote`).

Choices: `shuffle=True` with its default algorithm and block size, `batch_size` given to dataset
and DataLoader as its documentation asks. `predownload` is the 100,000 samples of its makers' image
training instead of eight batches: the thread that stays only just ahead competes with the loading
for the interpreter, which cost 40 % of the speed. `as_shipped` stores its `jpeg` type, which it
hands over as a PIL image; the transform sits in `__getitem__`, as in its image example.
"""

from collections.abc import Iterable
from typing import Any

from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.peers.batches import Batch, DecodeBatch, Settings, label_of, parse


def make_loader(settings: Settings) -> Iterable[Batch]:
    """The loader of one variant; each pass is an epoch."""
    # A killed run leaves segments behind that make the next one refuse the folder.
    clean_stale_shared_memory()
    ours = settings.variant == "ours"
    options = {
        "local": str(settings.data / "streaming" / settings.folder),
        "shuffle": True,
        "batch_size": settings.batch_size,
        "predownload": 100_000,
    }
    dataset = StreamingDataset(**options) if ours else Crops(settings, **options)
    return DataLoader(
        dataset,
        batch_size=settings.batch_size,
        collate_fn=DecodeBatch(settings) if ours else None,
        **settings.worker_options,
    )


class Crops(StreamingDataset):  # type: ignore[misc]
    """Samples as uint8 [S, S, 3] and int8 [A]; the axes are put back without a copy."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self.attributes = settings.attributes
        side = (settings.side, settings.side)
        self.transform = transforms.Compose([transforms.Resize(side), transforms.PILToTensor()])

    def __getitem__(self, at: int) -> Batch:
        """Image and label."""
        sample = super().__getitem__(at)
        pixels: Tensor = self.transform(sample["jpg"].convert("RGB"))
        return pixels.permute(1, 2, 0), label_of(parse(sample["json"]), self.attributes)
