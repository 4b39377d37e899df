"""Knobs of the training stream and of decoding (design 4)."""

from typing import Literal

from pydantic import Field

from vlal_dist.config.section import Section


class DataSection(Section):
    """From shards to batches."""

    likelihood: Literal["tar", "scores"] = Field(
        "tar", description="likelihoods from merged tars, or straight from score files"
    )
    train_split: str = Field("train", description="split that is trained on")
    validation_split: str = Field("val", description="split that selects the model")
    image_size: int = Field(
        224, ge=64, description="square input side (pixels; authors: 224; below 64 BatchNorm fails)"
    )
    normalize: bool = Field(
        False, description="subtract ImageNet mean, divide by std (authors: off)"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip (authors)")
    threads: int = Field(2, ge=1, description="decoding threads per rank")
    prefetch_steps: int = Field(4, ge=1, description="batches prepared ahead, per rank (steps)")
    window_blocks: int = Field(3, ge=1, description="shuffle window of a lane (blocks; design 4)")
    lanes: int = Field(0, ge=0, description="parallel lanes of an epoch, 0: design 4's rule")
    epoch_end: Literal["drop", "exact"] = Field(
        "drop", description="last incomplete batch: dropped (authors) or shorter"
    )
