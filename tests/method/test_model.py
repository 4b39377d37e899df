"""f_a(x, o): gate, precision, reproducible weights, optimizer groups."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from vlal_dist.config.sections import ModelConfig, TrainingConfig
from vlal_dist.errors import ConfigError
from vlal_dist.method.model import _narrow, build_model, make_trunk, parameter_groups

SIZES = {"num_objects": 6, "num_attributes": 9}


def small(seed=0, **config):
    return build_model(ModelConfig(depth=18, **config), **SIZES, seed=seed)


def image(batch=3):
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_gate_equals_a_linear_layer_on_one_hot_objects_over_the_feature_map():
    model = small().eval()
    encoder = nn.Linear(6, 512)
    with torch.no_grad():
        encoder.weight.copy_(model.object_table.weight.t())
        encoder.bias.copy_(model.object_bias)
        objects = torch.tensor([5, 0, 3])
        gate = torch.sigmoid(encoder(torch.eye(6)[objects]))
        features = model.trunk(image()) * gate[:, :, None, None]
        expected = model.classifier(features.mean(dim=(2, 3)))
        torch.testing.assert_close(model(image(), objects), expected)


def test_gate_starts_as_linears_default():
    model = build_model(ModelConfig(depth=18), num_objects=400, num_attributes=2)
    reference = nn.Linear(400, 512)
    for ours, theirs in (
        (model.object_table.weight, reference.weight),
        (model.object_bias, reference.bias),
    ):
        assert 0.9 / 20 < ours.abs().max() <= 1 / 20 and theirs.abs().max() <= 1 / 20
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15)


def test_without_gate_the_object_has_no_effect():
    model = small(object_gate=False).eval()
    with torch.no_grad():
        first, second = (model(image(1), torch.tensor([o])) for o in (0, 5))
    assert torch.equal(first, second)
    assert not [name for name in model.state_dict() if name.startswith("object")]


def test_logits_are_float32_under_autocast():
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(image(), torch.tensor([0, 1, 2]))
    assert logits.dtype == torch.float32 and logits.shape == (3, 9)
    assert not torch.equal(logits, logits.bfloat16().float())
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("seed", [0, 3])
def test_equal_seeds_give_equal_weights_and_leave_the_process_rng_alone(seed):
    before = torch.get_rng_state()
    first = small(seed=seed).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(17)
    second = small(seed=seed).state_dict()
    other = small(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_trunk_weights_from_a_file(tmp_path, suffix):
    resnet = torchvision.models.resnet18(weights=None)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(resnet.state_dict(), path)
    else:
        torch.save(resnet.state_dict(), path)
    model = small(weights=str(path))
    expected = {k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")}
    loaded = model.trunk.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_weights_that_are_absent_or_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        small(weights=str(tmp_path / "none.safetensors"))
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(torchvision.models.resnet34(weights=None).state_dict(), path)
    with pytest.raises(ConfigError, match="ResNet-18"):
        small(weights=str(path))
    path = tmp_path / "pickle.pth"
    torch.save(nn.Linear(2, 2), path)  # a pickled module: only tensors are read
    with pytest.raises(ConfigError, match="cannot be loaded"):
        small(weights=str(path))


def test_imagenet_asks_torchvision_for_v1(monkeypatch):
    asked = []

    class Weights:
        def get_state_dict(self, *, check_hash, weights_only):
            assert check_hash and weights_only
            return torchvision.models.resnet18(weights=None).state_dict()

    monkeypatch.setattr(torchvision.models, "get_weight", lambda n: asked.append(n) or Weights())
    small(weights="imagenet")
    assert asked == ["ResNet18_Weights.IMAGENET1K_V1"]


@pytest.mark.parametrize("pretrained", [True, False])
def test_parameter_groups(pretrained):
    model = small()
    groups = parameter_groups(model, TrainingConfig(), pretrained=pretrained)
    assert [g["name"] for g in groups] == [
        "base_decay", "base_no_decay", "fast_decay", "fast_no_decay",
    ]  # fmt: skip
    base = 1e-5 if pretrained else 7e-4
    assert [g["lr"] for g in groups] == [base, base, 7e-4, 7e-4]
    assert [g["weight_decay"] for g in groups] == [1e-4, 0, 1e-4, 0]
    members = [id(p) for g in groups for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in groups[2]["params"]] == [
        "object_table.weight",
        "classifier.weight",
    ]
    assert {names[id(p)] for p in groups[3]["params"]} == {"object_bias", "classifier.bias"}
    assert all(p.ndim == 1 for p in groups[1]["params"])
    torch.optim.Adam(groups).step()


@pytest.mark.parametrize("depth", [18, 50])
def test_a_narrow_trunk_has_the_layout_of_torchvisions(depth: int) -> None:
    wide, _ = make_trunk(depth=depth, width=64)
    narrow, num_features = make_trunk(depth=depth, width=16)
    assert list(narrow.state_dict()) == list(wide.state_dict())
    for name, full in wide.state_dict().items():
        quarter = narrow.state_dict()[name].shape
        assert all(a == b or 4 * a == b for a, b in zip(quarter, full.shape, strict=True)), name
    image = torch.rand(2, 3, 64, 64)
    assert narrow(image).shape == (2, num_features, 2, 2)
    assert 4 * num_features == wide(image).shape[1]


def test_the_narrow_builder_at_full_width_computes_what_torchvision_does() -> None:
    wide, _ = make_trunk(depth=50, width=64)
    built = _narrow(50, 64)
    built.load_state_dict(wide.state_dict())
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(built.eval()(image), wide.eval()(image), rtol=0, atol=0)


def test_narrow_weights_start_as_wide_ones_do() -> None:
    torch.manual_seed(0)
    narrow, _ = make_trunk(depth=18, width=32)
    conv = narrow.get_submodule("layer3.1.conv2").weight
    assert conv.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)  # kaiming, fan out


def test_imagenet_weights_do_not_fit_a_narrow_trunk(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    trunk, _ = make_trunk(depth=18, width=64)
    save_file(trunk.state_dict(), path)
    with pytest.raises(ConfigError, match=r"model\.width 64"):
        small(width=32, weights=str(path))
