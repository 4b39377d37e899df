"""The ONNX graph gives the probabilities of torch for any batch; other graphs are refused."""

import importlib.util
from dataclasses import replace
from importlib.machinery import ModuleSpec
from typing import cast

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.release.test_saved_model import INFO
from vlal_dist.config.sections import ModelConfig
from vlal_dist.data.format.images import IMAGENET_MEAN, IMAGENET_STD
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.method.model import AttributeClassifier, build_model
from vlal_dist.release import onnx_export
from vlal_dist.release.onnx_export import export_onnx, require_onnx


def network(*, object_gate: bool) -> AttributeClassifier:
    config = ModelConfig(depth=18, width=8, object_gate=object_gate)
    return build_model(config, num_objects=5, num_attributes=7).eval()


def test_any_batch_and_the_normalisation_within_the_graph() -> None:
    model = network(object_gate=True)
    data, difference = export_onnx(model, replace(INFO, normalize=True, num_objects=5))
    assert 0 <= difference < 1e-5
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    image, object_id = torch.rand(4, 3, 64, 64), torch.tensor([4, 0, 1, 1])
    given = {"image": image.numpy(), "object_id": object_id.numpy()}
    (found,) = session.run(["probability"], given)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = torch.sigmoid(model((image - mean) / std, object_id)).numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(expected - expected[:1]).max() > 1e-3  # crops and objects do differ


class Average(nn.Module):
    """The least network that a graph can be made of."""

    def forward(self, image: Tensor, object_id: Tensor) -> Tensor:
        return image.mean(dim=(1, 2, 3))[:, None] + object_id[:, None]


def test_a_graph_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    least = cast(AttributeClassifier, Average())
    info = replace(INFO, image_size=8, num_objects=5)
    export_onnx(least, info)
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(DataError, match="nothing was exported"):
        export_onnx(least, info)


def test_without_the_extra_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        return None if name == "onnxscript" else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ConfigError, match=r"needs onnxscript, .* pip install 'vlal-dist\[onnx\]'"):
        require_onnx()
