"""Vision-language assisted attribute learning on partially labelled data, at any scale.

    import vlal_dist as vlal

The public names below are imported on first use, so that importing the package itself is quick and
needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlal_dist.datasets import ShardDataset as ShardDataset
    from vlal_dist.datasets import ShardStream as ShardStream
    from vlal_dist.method.feasible import FeasibleSets as FeasibleSets
    from vlal_dist.release.model import load_model as load_model

__version__ = "0.2.0"

_NAMES = {
    "FeasibleSets": "vlal_dist.method.feasible",
    "ShardDataset": "vlal_dist.datasets",
    "ShardStream": "vlal_dist.datasets",
    "load_model": "vlal_dist.release.model",
}
"""Public name -> the module that defines it."""

__all__ = [
    "FeasibleSets",
    "ShardDataset",
    "ShardStream",
    "__version__",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
