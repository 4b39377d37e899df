"""Knobs of f_a(x, o), Sec. 2.1."""

from typing import Literal

from pydantic import Field

from vlal_dist.config.section import Section


class ModelSection(Section):
    """A torchvision ResNet whose channels are gated by the object."""

    depth: Literal[18, 34, 50, 101] = Field(50, description="ResNet depth (paper: 50)")
    width: int = Field(
        64,
        ge=1,
        description="channels of the first stage (every published ResNet: 64); fewer, with "
        "proportionally fewer in all stages: experiments on CPUs (docs/experiments.md)",
    )
    weights: str | None = Field(
        None,
        description="ImageNet weights: a .safetensors or torchvision state-dict file (path), "
        "`imagenet` to download torchvision's V1, absent: from scratch",
    )
    object_gate: bool = Field(True, description="gate channels by the object (authors' code)")
