"""Sec. 2.1: p_a = f_a(x, o), a ResNet whose pooled channels are gated by the object.

Gating channels and pooling over space commute, so the gate multiplies the pooled feature; a
Linear layer on a one-hot object is a table row plus a bias. Both equal the authors' network.

Shapes: B batch, C = 3, S image side, O objects, A attributes, D trunk channels.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from vlal_dist.config.sections import ModelConfig, TrainingConfig
from vlal_dist.errors import ConfigError


class AttributeClassifier(nn.Module):
    """f(x, o): logits of all attributes.

    Args:
        config: its `depth`, `width` and `object_gate` (multiply pooled channels by
            sigmoid(table[object] + bias), or use no object) are used.
        num_objects: O.
        num_attributes: A.
    """

    def __init__(self, config: ModelConfig, *, num_objects: int, num_attributes: int) -> None:
        super().__init__()
        self.trunk, num_features = make_trunk(depth=config.depth, width=config.width)
        self.object_table: nn.Embedding | None = None
        if config.object_gate:
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

        Raises:
            ValueError: shapes or types that do not fit, or an object that is not in 0..O-1 (on a
                GPU: a device-side assertion).
        """
        if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()):
            self._check(image, object_id)
        features = self.trunk(image)
        with torch.autocast(device_type=features.device.type, enabled=False):
            pooled = features.float().mean(dim=(2, 3))
            if self.object_table is not None:
                gate = self.object_table(object_id).float() + self.object_bias.float()
                pooled = pooled * torch.sigmoid(gate)
            weight, bias = self.classifier.weight, self.classifier.bias
            return F.linear(pooled, weight.float(), bias.float())

    def _check(self, image: Tensor, object_id: Tensor) -> None:
        """Check what `forward` takes; one object id would be broadcast to all photos."""
        if image.dim() != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(
                f"image: {image.dtype} {list(image.shape)}; give floating [B, 3, S, S]"
            )
        if self.object_table is None:
            return
        if object_id.shape != image.shape[:1] or object_id.dtype not in (torch.int64, torch.int32):
            form = f"{object_id.dtype} {list(object_id.shape)}"
            raise ValueError(f"object_id: {form}; give integers [{len(image)}]")
        if object_id.is_cpu and len(object_id):
            least, most = (int(one) for one in torch.aminmax(object_id))
            if least < 0 or most >= self.object_table.num_embeddings:
                raise ValueError(
                    f"object_id: {least}..{most}; the model has the objects "
                    f"0..{self.object_table.num_embeddings - 1}"
                )


def build_model(
    config: ModelConfig, *, num_objects: int, num_attributes: int, seed: int = 0
) -> AttributeClassifier:
    """A classifier on the CPU: equal weights for equal seeds; the process RNG is left as it was.

    Args:
        config: layers, and the trunk's initial weights.
        num_objects, num_attributes: O and A.
        seed: of the initial weights.

    Raises:
        ConfigError: weights that are absent or do not fit.
    """
    # devices=[] and the CPU's own generator: torch.manual_seed would reseed every GPU as well.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = AttributeClassifier(config, num_objects=num_objects, num_attributes=num_attributes)
    if config.weights is not None:
        load_trunk(model.trunk, config.weights, depth=config.depth)
    return model


def parameter_groups(
    model: AttributeClassifier, training: TrainingConfig, *, pretrained: bool
) -> list[dict[str, Any]]:
    """Four optimizer groups: base (trunk) and fast (gate, classifier), each with and without decay.

    Args:
        model: its parameters, each in exactly one group, in the model's order.
        training: rates of new layers, also of a trunk that is not pretrained, and of a pretrained
            trunk; weight decay of matrices and kernels (biases and other vectors have none).
        pretrained: whether the trunk started from weights.

    Returns:
        Groups with keys `name`, `params`, `lr`, `weight_decay`.
    """
    groups: dict[str, dict[str, Any]] = {}
    base = training.lr_pretrained if pretrained else training.lr_new
    for part, lr in (("base", base), ("fast", training.lr_new)):
        for suffix, decay in (("decay", training.weight_decay), ("no_decay", 0.0)):
            name = f"{part}_{suffix}"
            groups[name] = {"name": name, "params": [], "lr": lr, "weight_decay": decay}
    for name, parameter in model.named_parameters():
        part = "base" if name.startswith("trunk.") else "fast"
        suffix = "decay" if parameter.ndim > 1 else "no_decay"
        groups[f"{part}_{suffix}"]["params"].append(parameter)
    return list(groups.values())


FULL_WIDTH = 64
_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


def make_trunk(*, depth: int, width: int) -> tuple[nn.Sequential, int]:
    """A ResNet without pooling and classifier, and the number D of its output channels.

    At width 64 it is torchvision's network with torchvision's names, so that its weights fit.
    Narrower, it has the same blocks with proportionally fewer channels, for machines without a GPU.

    Args:
        depth: 18, 34, 50 or 101.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
    """
    block, _ = _BLOCKS[depth]
    num_features = 8 * width * block.expansion
    if width == FULL_WIDTH:
        resnet = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        parts = OrderedDict((name, getattr(resnet, name)) for name in _PARTS)
        return nn.Sequential(parts), num_features
    return _narrow(depth, width), num_features


def load_trunk(trunk: nn.Module, weights: str | Path, *, depth: int) -> None:
    """Load torchvision's weights into a trunk of width 64; the file's classifier is ignored.

    Args:
        trunk: from `make_trunk`.
        weights: a .safetensors or torchvision state-dict file, or `imagenet` to download
            torchvision's V1.
        depth: of the trunk.

    Raises:
        ConfigError: weights that are absent or do not fit.
    """
    try:
        if weights == "imagenet":
            known = torchvision.models.get_weight(f"ResNet{depth}_Weights.IMAGENET1K_V1")
            state = known.get_state_dict(check_hash=True, weights_only=True)
        elif Path(weights).suffix == ".safetensors":
            state = safetensors.torch.load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    except Exception as error:  # network, file, format and shape errors have no common type
        raise ConfigError(
            f"model.weights {weights}: cannot be loaded into ResNet-{depth} ({error}); give a "
            f"torchvision state dict of that depth at model.width {FULL_WIDTH}, `imagenet` with "
            "network access, or nothing"
        ) from error


def _narrow(depth: int, width: int) -> nn.Sequential:
    """torchvision's layout with other channel counts, and its initial weights."""
    block, counts = _BLOCKS[depth]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    channels = width
    for stage, count in enumerate(counts):
        planes = width * 2**stage
        blocks: list[nn.Module] = []
        for number in range(count):
            stride = 2 if stage and not number else 1
            out, down = planes * block.expansion, None
            if stride != 1 or channels != out:
                down = nn.Sequential(
                    nn.Conv2d(channels, out, kernel_size=1, stride=stride, bias=False),
                    nn.BatchNorm2d(out),
                )
            blocks.append(block(channels, planes, stride, down))
            channels = out
        parts[f"layer{stage + 1}"] = nn.Sequential(*blocks)
    trunk = nn.Sequential(parts)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return trunk
