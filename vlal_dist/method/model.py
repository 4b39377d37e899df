"""Sec. 2.1: p_a = f_a(x, o), a ResNet whose pooled channels are gated by the object.

Gating channels and pooling over space commute, so the gate multiplies the pooled feature; a
Linear layer on a one-hot object is a table row plus a bias. Both equal the authors' network.

Shapes: B batch, C = 3, S image side, O objects, A attributes, D trunk channels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlal_dist.method.trunk import FULL_WIDTH, load_trunk, make_trunk


class AttributeClassifier(nn.Module):
    """f(x, o): logits of all attributes.

    Args:
        depth: of the ResNet, 18, 34, 50 or 101 (paper: 50).
        width: channels of its first stage (every published ResNet: 64).
        num_objects: O.
        num_attributes: A.
        object_gate: multiply pooled channels by sigmoid(table[object] + bias), or use no object.
    """

    def __init__(
        self, *, depth: int, width: int, num_objects: int, num_attributes: int, object_gate: bool
    ) -> None:
        super().__init__()
        self.trunk, num_features = make_trunk(depth=depth, width=width)
        self.object_table: nn.Embedding | None = None
        if object_gate:
            self.object_table = nn.Embedding(num_objects, num_features)
            self.object_bias = nn.Parameter(torch.empty(num_features))
            # The default init of Linear(num_objects, num_features).
            bound = num_objects**-0.5
            nn.init.uniform_(self.object_table.weight, -bound, bound)
            nn.init.uniform_(self.object_bias, -bound, bound)
        self.classifier = nn.Linear(num_features, num_attributes)

    def forward(self, image: Tensor, object_id: Tensor) -> Tensor:
        """Logits float32 [B, A] of image floating [B, 3, S, S] and object_id int64 [B].

        Pooling, gate and classifier run in float32 also under autocast.
        """
        features = self.trunk(image)
        with torch.autocast(device_type=features.device.type, enabled=False):
            pooled = features.float().mean(dim=(2, 3))
            if self.object_table is not None:
                gate = self.object_table(object_id).float() + self.object_bias.float()
                pooled = pooled * torch.sigmoid(gate)
            weight, bias = self.classifier.weight, self.classifier.bias
            return F.linear(pooled, weight.float(), bias.float())


def build_model(
    *,
    depth: int,
    width: int = FULL_WIDTH,
    num_objects: int,
    num_attributes: int,
    object_gate: bool,
    weights: str | Path | None = None,
    seed: int = 0,
) -> AttributeClassifier:
    """A classifier on the CPU: equal weights for equal seeds; the process RNG is left as it was.

    Args:
        depth, width, num_objects, num_attributes, object_gate: see `AttributeClassifier`.
        weights: of the trunk: a .safetensors or torchvision state-dict file, `imagenet` to
            download torchvision's V1, None for none.
        seed: of the initial weights.

    Raises:
        ConfigError: no such trunk, or weights that are absent or do not fit.
    """
    # devices=[] and the CPU's own generator: torch.manual_seed would reseed every GPU as well.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = AttributeClassifier(
            depth=depth,
            width=width,
            num_objects=num_objects,
            num_attributes=num_attributes,
            object_gate=object_gate,
        )
    if weights is not None:
        load_trunk(model.trunk, weights, depth=depth)
    return model


def parameter_groups(
    model: AttributeClassifier,
    *,
    lr_new: float,
    lr_pretrained: float,
    weight_decay: float,
    pretrained: bool,
) -> list[dict[str, Any]]:
    """Four optimizer groups: base (trunk) and fast (gate, classifier), each with and without decay.

    Args:
        model: its parameters, each in exactly one group, in the model's order.
        lr_new: rate of new layers (7e-4, Sec. 3.2), and of the trunk if not pretrained.
        lr_pretrained: rate of a pretrained trunk (1e-5, Sec. 3.2).
        weight_decay: of matrices and kernels; biases and other vectors have none.
        pretrained: whether the trunk started from weights.

    Returns:
        Groups with keys `name`, `params`, `lr`, `weight_decay`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for part, lr in (("base", lr_pretrained if pretrained else lr_new), ("fast", lr_new)):
        for suffix, decay in (("decay", weight_decay), ("no_decay", 0.0)):
            name = f"{part}_{suffix}"
            groups[name] = {"name": name, "params": [], "lr": lr, "weight_decay": decay}
    for name, parameter in model.named_parameters():
        part = "base" if name.startswith("trunk.") else "fast"
        suffix = "decay" if parameter.ndim > 1 else "no_decay"
        groups[f"{part}_{suffix}"]["params"].append(parameter)
    return list(groups.values())
