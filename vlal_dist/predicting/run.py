"""The loop of predict: crops made ahead, a forward pass per batch, answers in the rows' order."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import torch

from vlal_dist.evaluation.exported import ExportedModel
from vlal_dist.predicting.crops import Crop, CropSettings, make_crops
from vlal_dist.predicting.outputs import Predicted
from vlal_dist.predicting.photos import Photos
from vlal_dist.predicting.requests import Reject, Request

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
