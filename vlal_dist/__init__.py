"""Vision-language assisted attribute learning on partially labelled data, at any scale.

    import vlal_dist as vlal

The public names below are imported on first use, so that importing the package itself is quick and
needs no torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlal_dist import losses as losses
    from vlal_dist.datasets import ShardDataset as ShardDataset
    from vlal_dist.datasets import ShardStream as ShardStream
    from vlal_dist.losses import SelectiveLoss as SelectiveLoss
    from vlal_dist.method.clip_likelihood import clip_likelihood as clip_likelihood
    from vlal_dist.method.feasible import FeasibleSets as FeasibleSets
    from vlal_dist.method.metrics import evaluate as evaluate
    from vlal_dist.release.model import load_model as load_model

__version__ = "0.4.0"

_NAMES = {
    "FeasibleSets": "vlal_dist.method.feasible",
    "SelectiveLoss": "vlal_dist.losses",
    "ShardDataset": "vlal_dist.datasets",
    "ShardStream": "vlal_dist.datasets",
    "clip_likelihood": "vlal_dist.method.clip_likelihood",
    "evaluate": "vlal_dist.method.metrics",
    "load_model": "vlal_dist.release.model",
}
"""Public name -> the module that defines it."""

__all__ = [
    "FeasibleSets",
    "SelectiveLoss",
    "ShardDataset",
    "ShardStream",
    "__version__",
    "clip_likelihood",
    "evaluate",
    "load_model",
    "losses",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("vlal_dist.losses")
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    if name != "evaluate":
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, whose `evaluate` is the function, not the program `vlal_dist/evaluate.py`."""

    @property
    def evaluate(self) -> Any:
        return __getattr__("evaluate")

    @evaluate.setter
    def evaluate(self, program: ModuleType) -> None:
        """Ignore the module that the import system puts here."""


sys.modules[__name__].__class__ = _Package
