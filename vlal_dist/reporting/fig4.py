"""Crops with their highest attributes, as in the paper's Fig. 4.

Of the crops with at least one annotated positive, those come first whose sha256 of seed and uid is
lowest: a rule that does not depend on scores.
"""

import base64
import hashlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.evaluation.predictions import Predictions
from vlal_dist.vocabulary import Vocabulary

CROP_SIDE = 176
JPEG_QUALITY = 82
LABEL_NAMES = {1: "present", -1: "absent", 0: "unannotated"}


def choose_rows(predictions: Predictions, *, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Positions in `predictions` of the examples, by the module's rule."""
    candidates = np.flatnonzero((predictions.label == 1).any(axis=1))
    keys = [
        hashlib.sha256(f"{seed}:{uid}".encode()).digest() for uid in predictions.uid[candidates]
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)[:count]
    return np.asarray(candidates[order], dtype=np.int64)


def build_example(
    reader: SampleReader,
    predictions: Predictions,
    position: int,
    *,
    vocabulary: Vocabulary,
    truth: npt.NDArray[np.int8] | None,
    k: int,
) -> dict[str, Any]:
    """Read one crop and set its highest k attributes beside its annotation.

    Args:
        reader: of the split.
        predictions: of the split.
        position: index into the predictions.
        vocabulary: names.
        truth: complete labels [N, A], aligned with the predictions, if known.
        k: attributes listed.

    Returns:
        `image`, data URI of a small JPEG; `width`, `height`, its pixels; `object_name`;
        `instance_id` and `image_id` of the annotation; `positives`, names annotated present;
        `guesses`, highest first: `name`, `score`, `kind` (present, absent or unannotated), `truth`
        (present, absent, or empty where not known).
    """
    sample = reader.read(int(predictions.row[position]))
    image = Image.fromarray(decode_jpeg(sample.jpg))
    image.thumbnail((CROP_SIDE, CROP_SIDE), Image.Resampling.LANCZOS)
    jpg = io.BytesIO()
    image.save(jpg, "JPEG", quality=JPEG_QUALITY)
    label, score = predictions.label[position], predictions.score[position]
    return {
        "image": f"data:image/jpeg;base64,{base64.b64encode(jpg.getvalue()).decode('ascii')}",
        "width": image.width,
        "height": image.height,
        "object_name": vocabulary.objects[sample.object_id],
        "instance_id": sample.instance_id,
        "image_id": sample.image_id,
        "positives": [vocabulary.attributes[i] for i in np.flatnonzero(label == 1)],
        "guesses": [
            {
                "name": vocabulary.attributes[attribute],
                "score": float(score[attribute]),
                "kind": LABEL_NAMES[int(label[attribute])],
                "truth": "" if truth is None else LABEL_NAMES[int(truth[position, attribute])],
            }
            for attribute in top_attributes(score, k)
        ],
    }


def tally(
    predictions: Predictions, truth: npt.NDArray[np.int8] | None, *, k: int
) -> dict[str, float]:
    """Shares of the k highest attributes of all crops, by annotation.

    Returns:
        `present`, `absent`, `unannotated` (they sum to 1), and with complete labels
        `unannotated_true`: the share of the unannotated ones that are truly present.
    """
    top = top_attributes(predictions.score, k)
    label = np.take_along_axis(predictions.label, top, axis=1)
    total = max(label.size, 1)
    shares = {name: float((label == sign).sum() / total) for sign, name in LABEL_NAMES.items()}
    if truth is not None:
        unannotated = np.take_along_axis(truth, top, axis=1)[label == 0]
        shares["unannotated_true"] = float((unannotated == 1).mean()) if len(unannotated) else 0.0
    return shares


def top_attributes(score: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Ids of the k highest scores of each row, highest first, ties to the lower id; [N, k]."""
    return np.argsort(-score, axis=-1, kind="stable")[..., :k]
