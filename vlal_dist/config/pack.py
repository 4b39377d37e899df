"""Knobs of `shard_tools pack`: crops, JPEG settings, shard and block sizes."""

from pydantic import Field

from vlal_dist.config.section import Section


class PackSection(Section):
    """From instances and photos to verified WebDataset tars."""

    name: str = Field("vaw", min_length=1, description="dataset name; part of every sample's uid")
    images: list[str] = Field(
        default_factory=list,
        description="folders or zip files searched for `{image_id}.jpg`, in order (paths)",
    )
    shard_bytes: int = Field(
        256_000_000, ge=1024, description="tar size aimed at (bytes; stores like 100 MB-1 GB)"
    )
    block_bytes: int = Field(
        524_288, ge=1024, description="neighbouring samples read together (bytes; design 4)"
    )
    jpeg_quality: int = Field(95, ge=1, le=100, description="quality of re-encoded crops (4:4:4)")
    box_expansion: float = Field(
        0.0,
        ge=0,
        le=2,
        description="margin added around the box, share of its shorter side (authors: intended "
        "0.3, bug gives 0)",
    )
    max_pixels: int = Field(
        64_000_000, ge=1, description="largest photo decoded (pixels; decompression bombs)"
    )
    workers: int = Field(0, ge=0, description="processes, 0: one per core")
    seed: int = Field(0, ge=0, description="order of photos in the shards")
    max_rejected: float = Field(
        0.001, ge=0, le=1, description="share of rejected instances that is still success"
    )
