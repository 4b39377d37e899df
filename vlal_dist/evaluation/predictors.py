"""Predictors: a trained model, a constant, and zero-shot CLIP from score files.

`predict` serves training (each rank its rows, joined by `merge_predictions`) and evaluate. The
others read no image: labels and ids come from the dataset's tables.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from vlal_dist.data.format.dataset import Dataset, open_split, read_labels
from vlal_dist.data.format.scores import read_scores_manifest, read_shard_scores
from vlal_dist.data.loading.batch import Batch, on_device
from vlal_dist.errors import DataError
from vlal_dist.evaluation.predictions import Predictions, concatenate, label_matrix
from vlal_dist.storage.store import Store

CONSTANT_SCORE = 0.5


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_attributes: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    advance: Callable[[int], None] | None = None,
) -> Predictions:
    """Probabilities P = sigmoid(z) of the samples in `batches`, in their order.

    The model runs in eval mode; its mode is restored afterwards. Rows of weight 0 (dummies) are
    left out.

    Args:
        model: (image float32 [B, 3, S, S], object_id int64 [B]) -> logits [B, A], on `device`.
        batches: from `evaluation_batches`; there may be none.
        num_attributes: A, needed when there is no batch.
        device: where the model is.
        autocast: dtype of mixed precision, e.g. `torch.bfloat16`; absent: float32. Logits are
            cast to float32 before the sigmoid in any case.
        advance: called with the number of samples of each finished batch.
    """
    was_training = model.training
    model.eval()
    parts = [
        Predictions(
            row=np.zeros(0, np.int64),
            uid=np.zeros(0, np.uint64),
            score=np.zeros((0, num_attributes), np.float32),
            label=np.zeros((0, num_attributes), np.int8),
        )
    ]
    try:
        for batch in batches:
            moved = on_device(batch, device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits = model(moved.image, moved.object_id)
            score = torch.sigmoid(logits.float()).cpu()
            real = batch.row_weight > 0
            parts.append(
                Predictions(
                    row=batch.row[real].numpy(),
                    uid=batch.uid[real].numpy().view(np.uint64),
                    score=score[real].numpy(),
                    label=batch.label[real].numpy(),
                )
            )
            if advance is not None:
                advance(int(real.sum()))
    finally:
        model.train(was_training)
    return concatenate(parts)


def predict_constant(dataset: Dataset, split: str) -> Predictions:
    """The score 0.5 everywhere: the average precision of an attribute is its share of positives."""
    return _from_tables(dataset, split, score=CONSTANT_SCORE)


def predict_clip(dataset: Dataset, split: str, *, scores: Store) -> Predictions:
    """Zero-shot CLIP: (cosine + 1) / 2 of each feasible attribute, 0 of each infeasible one.

    An infeasible attribute is never proposed: its prompt was never scored (Sec. 2.2). The values
    rank crops, they are no probabilities: a metric that cuts at 0.5, such as mA, says little.

    Raises:
        DataError: the score files belong to another dataset or other feasible sets, or do not
            cover the split.
    """
    manifest = read_scores_manifest(
        scores,
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
    )
    if split not in manifest["splits"]:
        raise DataError(
            f"scores at {scores.url} cover the splits {', '.join(manifest['splits'])}, not "
            f'{split}; score it too (vlal score --scoring.splits "[{split}]") and point '
            "paths.scores there"
        )
    opened = open_split(dataset, split)
    predictions = _from_tables(dataset, split, score=0.0)
    for number, shard in enumerate(opened.shards):
        rows = np.arange(*np.searchsorted(opened.index.shard, [number, number + 1]))
        found = read_shard_scores(scores, split, shard_sha256=shard.sha256, manifest=manifest)
        feasible = [dataset.feasible.of(int(owner)) for owner in opened.index.object_id[rows]]
        sizes = np.diff(found.indptr)
        same = np.array_equal(found.uid, predictions.uid[rows])
        if not (same and np.array_equal(sizes, [len(ids) for ids in feasible])):
            raise DataError(
                f"{scores.url}: the scores of shard {shard.name} are of other samples or feasible "
                f"sets than those of {dataset.url}; score this dataset into a new paths.scores"
            )
        # Rounding can push the cosine of two unit vectors a hair over 1.
        value = np.clip((found.similarity + 1) / 2, 0, 1)
        predictions.score[np.repeat(rows, sizes), np.concatenate(feasible)] = value
    return predictions


def _from_tables(dataset: Dataset, split: str, *, score: float) -> Predictions:
    """Rows, uids and labels of a split, one score everywhere."""
    width = len(dataset.vocabulary.attributes)
    uid = np.array(open_split(dataset, split).index.uid, dtype=np.uint64)
    table = read_labels(dataset, split)
    return Predictions(
        row=np.arange(len(uid), dtype=np.int64),
        uid=uid,
        score=np.full((len(uid), width), score, dtype=np.float32),
        label=label_matrix(table["positive"], table["negative"], width=width),
    )
