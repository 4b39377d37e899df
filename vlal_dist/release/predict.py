"""Predict attributes of objects in photos with an exported model.

Consecutive requests of one photo share its decoding; sort a table by image.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import numpy.typing as npt
import torch

from vlal_dist.config.sections import PredictConfig
from vlal_dist.data.format.images import open_photo
from vlal_dist.data.format.photos import Photos
from vlal_dist.data.loading.decode import square_into
from vlal_dist.errors import DataError
from vlal_dist.release.model import ExportedModel, ExportInfo, FoundAttribute
from vlal_dist.release.requests import Reject, Request, reject

_LARGEST_GROUP = 32
"""Requests that a thread takes at a time; a photo with more is decoded again."""
_BATCHES_AHEAD = 2


Answer = tuple[Request, list[FoundAttribute]]
"""A request and its attributes, likeliest first."""


def predict_requests(
    model: ExportedModel,
    requests: Iterable[Request | Reject],
    photos: Photos,
    config: PredictConfig,
) -> Iterator[list[Answer] | Reject]:
    """Answer requests; memory is bounded by a few batches, whatever their number.

    Args:
        model: on the device that computes.
        requests: in the order in which they are answered.
        photos: where their photos are.
        config: batch size, threads, limits, and what is listed.

    Yields:
        The answers of a batch, or a row that cannot be used, as soon as they are known.
    """
    waiting: list[Crop] = []
    for made in make_crops(requests, photos, model.info, config):
        if isinstance(made, Reject):
            yield made
            continue
        waiting.append(made)
        if len(waiting) == config.batch_size:
            yield _answer(model, waiting, config)
            waiting = []
    if waiting:
        yield _answer(model, waiting, config)


@dataclass(frozen=True)
class Crop:
    """A request and its pixels, uint8 [S, S, 3]."""

    request: Request
    pixels: npt.NDArray[np.uint8]


def make_crops(
    requests: Iterable[Request | Reject], photos: Photos, info: ExportInfo, config: PredictConfig
) -> Iterator[Crop | Reject]:
    """A crop for each request, or the reason why not, in the order of the requests.

    Args:
        requests: rejects among them are handed on.
        photos: where the photos are.
        info: the model's input size and box margin.
        config: threads that read, decode and crop; the largest photo.
    """
    pending: deque[tuple[int, Future[list[Crop | Reject]]]] = deque()
    rows = 0
    pool = ThreadPoolExecutor(max_workers=config.threads, thread_name_prefix="crop")
    try:
        for _, same_photo in groupby(requests, key=lambda one: one.image):
            while group := list(islice(same_photo, _LARGEST_GROUP)):
                future = pool.submit(_crops_of_photo, group, photos, info, config.max_pixels)
                pending.append((len(group), future))
                rows += len(group)
                while rows > _BATCHES_AHEAD * config.batch_size:
                    count, future = pending.popleft()
                    yield from future.result()
                    rows -= count
        while pending:
            yield from pending.popleft()[1].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _crops_of_photo(
    group: Iterable[Request | Reject], photos: Photos, info: ExportInfo, max_pixels: int
) -> list[Crop | Reject]:
    made: list[Crop | Reject] = []
    image, side = None, info.model.image_size
    for one in group:
        if isinstance(one, Reject):
            made.append(one)
            continue
        pixels = np.empty((side, side, 3), dtype=np.uint8)
        try:
            if image is None:
                image = open_photo(
                    photos.read(one.image), max_pixels=max_pixels, background=info.background
                )
            square_into(image, one.box, pixels, expansion=info.box_expansion, max_pixels=max_pixels)
            made.append(Crop(one, pixels))
        except DataError as error:
            made.append(reject(one.row, one.id, one.image, one.object_name, error))
    return made


def _answer(model: ExportedModel, crops: list[Crop], config: PredictConfig) -> list[Answer]:
    pixels = torch.from_numpy(np.stack([crop.pixels for crop in crops]))
    object_id = torch.tensor([crop.request.object_id for crop in crops])
    found = model.top(model.probabilities(pixels, object_id), k=config.top_k)
    return [(crop.request, row) for crop, row in zip(crops, found, strict=True)]
