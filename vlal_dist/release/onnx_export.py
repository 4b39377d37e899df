"""ONNX export of a model, checked against torch.

Inputs `image` float32 [B, 3, S, S], RGB in [0, 1] (normalisation is part of the graph), and
`object_id` int64 [B] (ignored without an object gate); output `probability` float32 [B, A].
Needs onnx, onnxscript and onnxruntime: the extra `onnx`.
"""

import importlib.util
import logging
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlal_dist.data.format.images import IMAGENET_MEAN, IMAGENET_STD
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.method.model import AttributeClassifier
from vlal_dist.release.saved_model import SavedModelInfo

TOLERANCE = 1e-4
"""Largest difference of a probability; float32 arithmetic in another order gives about 1e-6."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
CHECKED_BATCHES = (1, 2, 7)


class _Probability(nn.Module):
    """From pixels in [0, 1] to probabilities."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: AttributeClassifier, *, normalize: bool) -> None:
        super().__init__()
        self.network, self.normalize = network, normalize
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    def forward(self, image: Tensor, object_id: Tensor) -> Tensor:
        """float32 [B, A]."""
        if self.normalize:
            image = (image - self.mean) / self.std
        return torch.sigmoid(self.network(image, object_id))


def require_onnx() -> None:
    """Raise ConfigError unless the extra is installed."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"export.onnx needs {', '.join(absent)}, which is not installed; run "
            "pip install 'vlal-dist[onnx]', or leave export.onnx false"
        )


def export_onnx(network: AttributeClassifier, info: SavedModelInfo) -> tuple[bytes, float]:
    """The model as an ONNX file, and the largest difference of a probability from torch's.

    Args:
        network: on the CPU, in eval mode.
        info: its description.

    Raises:
        DataError: onnxruntime and torch differ by more than `TOLERANCE`.
    """
    module, side = _Probability(network, normalize=info.normalize).eval(), info.image_size
    example = (torch.rand(2, 3, side, side), torch.zeros(2, dtype=torch.int64))
    batch = torch.export.Dim("batch")
    for name in ("onnx_ir", "onnxscript"):  # a line for each pass of their optimizer
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # The exporter warns of its own helpers; its result is compared below.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image", "object_id"],
            output_names=["probability"],
            dynamic_shapes=({0: batch}, {0: batch}),
            verbose=False,
        )
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    difference = _largest_difference(data, module, info)
    if not difference <= TOLERANCE:
        raise DataError(
            f"model.onnx: a probability differs by {difference:.3g} from torch's, at most "
            f"{TOLERANCE:g} is rounding; nothing was exported: report this with the versions of "
            "torch, onnxscript and onnxruntime, or leave export.onnx false"
        )
    return data, difference


@torch.inference_mode()
def _largest_difference(data: bytes, module: nn.Module, info: SavedModelInfo) -> float:
    """Over random batches of several sizes; infinite where a value is not finite."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    random, side = torch.Generator().manual_seed(0), info.image_size
    worst = 0.0
    for size in CHECKED_BATCHES:
        image = torch.rand(size, 3, side, side, generator=random)
        object_id = torch.randint(info.num_objects, (size,), generator=random)
        inputs = {"image": image.numpy(), "object_id": object_id.numpy()}
        (found,) = session.run(["probability"], inputs)
        expected = module(image, object_id).numpy()
        if found.shape != expected.shape or not np.isfinite(found).all():
            return float("inf")
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst
