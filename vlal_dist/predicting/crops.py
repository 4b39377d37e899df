"""From requests to squares of pixels: photos read, decoded and cropped in threads, ahead, in order.

Consecutive requests of one photo share its decoding; sort a table by image.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlal_dist.data.images import open_photo
from vlal_dist.data.square import square_into
from vlal_dist.errors import DataError
from vlal_dist.predicting.photos import Photos
from vlal_dist.predicting.requests import Reject, Request, reject

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
