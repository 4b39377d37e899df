"""Predict attributes of objects in photos with an exported model.

Consecutive requests of one photo share its decoding; sort a table by image.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vlal_dist.data.format.images import open_photo
from vlal_dist.data.format.photos import Photos
from vlal_dist.data.loading.decode import square_into
from vlal_dist.errors import DataError
from vlal_dist.release.model import ExportedModel
from vlal_dist.release.prediction_files import Predicted
from vlal_dist.release.requests import Reject, Request, reject

_LARGEST_GROUP = 32
"""Requests that a thread takes at a time; a photo with more is decoded again."""


@dataclass(frozen=True)
class Crop:
    """A request and its pixels, uint8 [S, S, 3]."""

    request: Request
    square: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CropSettings:
    """What a crop is.

    Attributes:
        side: S, pixels.
        expansion: margin, as in `crop_bounds`.
        max_pixels: of a photo and of a crop.
    """

    side: int
    expansion: float
    max_pixels: int


def make_crops(
    requests: Iterable[Request | Reject],
    photos: Photos,
    settings: CropSettings,
    *,
    threads: int,
    ahead: int,
) -> Iterator[Crop | Reject]:
    """A crop for each request, or the reason why not, in the order of the requests.

    Args:
        requests: rejects among them are handed on.
        photos: where the photos are.
        settings: of the crops.
        threads: that read, decode and crop.
        ahead: rows in the making at most, about.
    """
    pending: deque[tuple[int, Future[list[Crop | Reject]]]] = deque()
    rows = 0
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="crop")
    try:
        for group in _by_photo(requests):
            pending.append((len(group), pool.submit(_work, group, photos, settings)))
            rows += len(group)
            while rows > ahead:
                count, future = pending.popleft()
                yield from future.result()
                rows -= count
        while pending:
            yield from pending.popleft()[1].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _by_photo(requests: Iterable[Request | Reject]) -> Iterator[list[Request | Reject]]:
    for _, group in groupby(requests, key=lambda one: one.image):
        while part := list(islice(group, _LARGEST_GROUP)):
            yield part


def _work(
    group: list[Request | Reject], photos: Photos, settings: CropSettings
) -> list[Crop | Reject]:
    """Crops of one photo, which is opened once."""
    made: list[Crop | Reject] = []
    image: Image.Image | None = None
    for one in group:
        if isinstance(one, Reject):
            made.append(one)
            continue
        square = np.empty((settings.side, settings.side, 3), dtype=np.uint8)
        expansion, max_pixels = settings.expansion, settings.max_pixels
        try:
            if image is None:
                image = open_photo(photos.read(one.image), max_pixels=max_pixels)
            square_into(image, one.box, square, expansion=expansion, max_pixels=max_pixels)
            made.append(Crop(one, square))
        except DataError as error:
            made.append(reject(one.row, one.id, one.image, one.object_name, error))
    return made


BATCHES_AHEAD = 2


def predict_requests(
    model: ExportedModel,
    requests: Iterable[Request | Reject],
    photos: Photos,
    *,
    write: Callable[[Predicted], None],
    write_reject: Callable[[Reject], None],
    top_k: int,
    thresholds: bool,
    batch_size: int,
    threads: int,
    max_pixels: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[int, Counter[str]]:
    """Answer every request; memory is bounded by a few batches, whatever their number.

    Args:
        model: on the device that computes.
        requests: in the order in which they are answered.
        photos: where their photos are.
        write: takes the answers of a batch.
        write_reject: takes a row that cannot be used.
        top_k: attributes per row; 0: all.
        thresholds: whether to say which are present.
        batch_size: rows of a forward pass.
        threads: that make crops.
        max_pixels: of a photo and of a crop.
        advance: called with the number of rows dealt with.

    Returns:
        How many rows were answered, and how many were not, by reason.
    """
    settings = CropSettings(model.info.model.image_size, model.info.box_expansion, max_pixels)
    waiting: list[Crop] = []
    answered, rejected = 0, Counter[str]()

    def answer() -> None:
        nonlocal answered
        write(_answer(model, waiting, top_k=top_k, thresholds=thresholds))
        answered += len(waiting)
        if advance is not None:
            advance(len(waiting))
        waiting.clear()

    ahead = BATCHES_AHEAD * batch_size
    for made in make_crops(requests, photos, settings, threads=threads, ahead=ahead):
        if isinstance(made, Reject):
            write_reject(made)
            rejected[made.reason] += 1
            if advance is not None:
                advance(1)
            continue
        waiting.append(made)
        if len(waiting) == batch_size:
            answer()
    if waiting:
        answer()
    return answered, rejected


def _answer(model: ExportedModel, crops: list[Crop], *, top_k: int, thresholds: bool) -> Predicted:
    squares = torch.from_numpy(np.stack([crop.square for crop in crops]))
    object_id = torch.tensor([crop.request.object_id for crop in crops])
    probability = model.probabilities(squares, object_id).numpy()
    ids, values, present = model.top(probability, k=top_k)
    requests = [crop.request for crop in crops]
    return Predicted(requests, ids, values, present if thresholds else None)
