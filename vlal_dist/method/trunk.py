"""The trunk of f(x, o): a ResNet up to its last stage, without pooling and classifier.

At width 64 it is torchvision's network with torchvision's names, so that its weights fit. Narrower,
it is made of the same blocks with proportionally fewer channels, for machines without a GPU.
"""

from collections import OrderedDict
from pathlib import Path

import safetensors.torch
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from vlal_dist.errors import ConfigError

FULL_WIDTH = 64
_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


def make_trunk(*, depth: int, width: int) -> tuple[nn.Sequential, int]:
    """The trunk with fresh weights, and the number D of its output channels.

    Args:
        depth: 18, 34, 50 or 101.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.

    Raises:
        ConfigError: no such depth, or a width below 1.
    """
    if depth not in _BLOCKS or width < 1:
        raise ConfigError(
            f"depth is {depth}, width {width}; give a depth of {', '.join(map(str, _BLOCKS))} and "
            "a width of at least 1"
        )
    block, _ = _BLOCKS[depth]
    num_features = 8 * width * block.expansion
    if width == FULL_WIDTH:
        resnet = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        parts = OrderedDict((name, getattr(resnet, name)) for name in _PARTS)
        return nn.Sequential(parts), num_features
    return _narrow(depth, width), num_features


def load_trunk(trunk: nn.Module, weights: str | Path, *, depth: int) -> None:
    """Fill a trunk of full width from torchvision's names; the file's classifier is left out.

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
