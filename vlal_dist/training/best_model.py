"""The best model of a run: `best/`, which evaluate, export and predict read."""

import hashlib
import json

from torch import nn

from vlal_dist.errors import NotFoundError, StorageError
from vlal_dist.release.saved_model import SavedModelInfo, encode_weights, write_model
from vlal_dist.storage.store import Store
from vlal_dist.training.checkpoint import TrainState

BEST = "best"


class BestModel:
    """Kept in memory when it is found, written then or as soon as the store takes it; on rank 0.

    Args:
        store: the run root.
        model: the model being trained.
        settings: the fields of `SavedModelInfo` that a state does not tell.
    """

    def __init__(self, store: Store, model: nn.Module, **settings: object) -> None:
        self._store, self._model, self._settings = store, model, settings
        self._unwritten: tuple[bytes, SavedModelInfo] | None = None

    def keep(self, state: TrainState) -> None:
        """Remember the model as it is now.

        Args:
            state: where the run stands; the best step and mAP are of this model.
        """
        info = SavedModelInfo(
            **self._settings,  # type: ignore[arg-type]
            vocabulary_digest=state.binding.vocabulary_digest,
            feasible_digest=state.binding.feasible_digest,
            seed=state.binding.seed,
            step=state.step,
            epoch=state.epoch + 1,
            validation_map=state.best_map or 0.0,
        )
        self._unwritten = encode_weights(self._model), info

    def write(self) -> None:
        """Write what was kept and is not written yet.

        Raises:
            StorageError: it could not be; it stays kept.
        """
        if self._unwritten is not None:
            write_model(self._store, BEST, *self._unwritten)
            self._unwritten = None


def holds_best(store: Store, state: TrainState) -> bool:
    """Whether the best model that a state names is in the run root, and whole."""
    try:
        info = json.loads(store.read(f"{BEST}/model.json"))
        weights = store.read(f"{BEST}/model.safetensors")
    except NotFoundError:
        return False
    except StorageError:
        return True  # out of reach now: nothing says that it was altered
    return (info.get("step"), info.get("validation_map"), info.get("sha256")) == (
        state.best_step,
        state.best_map,
        hashlib.sha256(weights).hexdigest(),
    )
