"""Validation during training: score the validation split, keep the best model.

The best model is written to `best/` of the run root, which evaluate, export and predict read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from vlal_dist.config.sections import EvaluationConfig
from vlal_dist.contents import parse_json
from vlal_dist.data.hashing import signed_uids, unsigned_uids
from vlal_dist.data.loading.batch import Batch
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.loader import evaluation_batches
from vlal_dist.errors import DataError, NotFoundError, Stopped, StorageError
from vlal_dist.evaluation.predictions import Predictions, merge_predictions
from vlal_dist.evaluation.predictors import predict
from vlal_dist.method.metrics import Evaluation, counted_labels, evaluate
from vlal_dist.release.saved_model import SavedModelInfo, encode_weights, write_model
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import Store
from vlal_dist.training.checkpoint import TrainState
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.stop import StopRequest

BEST = "best"


class Validator:
    """Scores the validation split in float32; each rank takes neighbouring rows.

    Args:
        builder: batches of the validation split.
        model: the model in training, on the ranks' device.
        ranks: this process among its peers.
        groups: group name -> attribute ids.
        config: `batch_size`, `top_k`, `threshold`, `unannotated`.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        model: nn.Module,
        ranks: Ranks,
        *,
        groups: Mapping[str, Sequence[int]],
        config: EvaluationConfig,
    ) -> None:
        self._builder, self._model, self._ranks = builder, model, ranks
        self._groups, self._config = groups, config
        self._num_samples = len(builder.reader.corpus)
        # Neighbours, so that no block of a remote split is read by two ranks.
        self._rows = np.array_split(np.arange(self._num_samples), ranks.world_size)[ranks.rank]

    def evaluate(self, stop: StopRequest) -> Evaluation:
        """Metrics of the present model; every rank must call, and gets the same.

        Raises:
            Stopped: `stop` was requested on some rank; on every rank.
            DataError, StorageError: a sample cannot be read; on every rank.
        """
        batches = evaluation_batches(self._builder, self._rows, batch_size=self._config.batch_size)
        with closing(batches):
            own = predict(
                self._model,
                self._in_step(batches, stop),
                num_attributes=self._builder.num_attributes,
                device=self._ranks.device,
            )
        merged = merge_predictions(self._gather(own), num_samples=self._num_samples)
        return evaluate(
            merged.score,
            counted_labels(merged.label, self._config.unannotated),
            groups=self._groups,
            top_k=self._config.top_k,
            threshold=self._config.threshold,
        )

    def _in_step(self, batches: Iterator[Batch], stop: StopRequest) -> Iterator[Batch]:
        """This rank's batches; before each, all ranks agree that they can and want to go on."""
        most_rows = -(-self._num_samples // self._ranks.world_size)  # of rank 0
        for _ in range(-(-most_rows // self._config.batch_size)):
            batch = self._ranks.together(lambda: next(batches, None))
            (stopped,) = self._ranks.agree(stop.requested)
            if stopped:
                raise Stopped("stopped during validation")
            if batch is not None:
                yield batch

    def _gather(self, own: Predictions) -> list[Predictions]:
        """The predictions of all ranks, on every rank."""
        arrays = (own.row, signed_uids(own.uid), own.score, own.label)
        sent = (torch.from_numpy(array).to(self._ranks.device) for array in arrays)
        gathered = ([part.cpu().numpy() for part in self._ranks.gather(one)] for one in sent)
        return [
            Predictions(row=row, uid=unsigned_uids(uid), score=score, label=label)
            for row, uid, score, label in zip(*gathered, strict=True)
        ]


class BestModel:
    """The best model so far: copied when found, written as soon as the store takes it; on rank 0.

    Args:
        store: the run root.
        model: the model in training.
        info: its description; step, epoch and score are filled in when a best model is found.
    """

    def __init__(self, store: Store, model: nn.Module, info: SavedModelInfo) -> None:
        self._store, self._model, self._info = store, model, info
        self._unwritten: tuple[bytes, SavedModelInfo] | None = None

    def keep(self, state: TrainState) -> None:
        """Copy the present model, whose score is `state.best_map` (None: undefined), and write it.

        Raises:
            StorageError: it could not be written; the copy is kept for `write`.
        """
        info = replace(
            self._info,
            step=state.step,
            epoch=state.epoch + 1,
            validation_map=state.best_map,
        )
        self._unwritten = encode_weights(self._model), info
        self.write()

    def write(self) -> None:
        """Write the copy, if it is not written yet; raises as `keep`."""
        if self._unwritten is not None:
            write_model(self._store, BEST, *self._unwritten)
            self._unwritten = None


def holds_best(store: Store, state: TrainState) -> bool:
    """Whether the run root holds the best model of `state`, complete; True if out of reach."""
    try:
        data = store.read(f"{BEST}/model.json")
        info = parse_json(data, dict[str, Any], where=f"{BEST}/model.json", remedy="")
        weights = store.read(f"{BEST}/model.safetensors")
    except (NotFoundError, DataError):
        return False
    except StorageError:
        return True
    return (info.get("step"), info.get("validation_map"), info.get("sha256")) == (
        state.best_step,
        state.best_map,
        sha256_of(weights),
    )
