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
    decode: Literal["cpu", "gpu"] = Field(
        "cpu", description="where crops are decoded for training; gpu: nvJPEG, close but not equal"
    )
    threads: int = Field(2, ge=1, description="decoding threads per rank")
    prefetch_steps: int = Field(4, ge=1, description="batches prepared ahead, per rank (steps)")
    window_blocks: int = Field(3, ge=1, description="shuffle window of a lane (blocks; design 4)")
    mix: dict[str, float] = Field(
        default_factory=dict,
        description="merged roots trained on together -> passes over each per epoch, fractions "
        "allowed; empty: paths.merged once (one vocabulary: clean --like)",
    )
    subset: str | None = Field(
        None, description="file with a sample key per line: only these are trained on (path, URL)"
    )
    repeat_threshold: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="t: a sample is visited max(1, sqrt(t / f)) times an epoch, f the share of "
        "samples with the rarest of its positives; 0: off (repeat factors of LVIS, 2019)",
    )
    damage: Literal["strict", "quarantine"] = Field(
        "strict",
        description="a sample that fails its checksum twice: stop, or leave it out and count it",
    )
    max_quarantined: float = Field(
        0.001,
        ge=0,
        le=1,
        description="share of the samples quarantined before the run stops; above 0, one at least",
    )
    cache_bytes: int = Field(
        0,
        ge=0,
        description="limit of the disk cache for remote shards in paths.cache, shared by the ranks "
        "of a node (bytes; 0: off)",
    )
    decoded_bytes: int = Field(
        0,
        ge=0,
        description="limit of the decoded crops that each rank keeps in memory, S x S x 3 bytes "
        "each: decoded once, not every epoch; the same bits (bytes; 0: off; docs/experiments.md)",
    )
    lanes: int = Field(0, ge=0, description="parallel lanes of an epoch, 0: design 4's rule")
    epoch_end: Literal["drop", "exact"] = Field(
        "drop", description="last incomplete batch: dropped (authors) or shorter"
    )
