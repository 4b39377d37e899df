"""Knobs of `predict`: which photos, which objects, and what is written of them."""

from pydantic import Field

from vlal_dist.config.section import Section


class PredictSection(Section):
    """Attributes of objects in photos, by an exported model."""

    model: str | None = Field(
        None, description="folder written by export (path or URL); absent: paths.export"
    )
    images: str | None = Field(
        None,
        description="photos: a folder, searched with all below it, or a zip (path), or s3://; "
        "with a table where its photos are, absent: the table's own folder",
    )
    table: str | None = Field(
        None,
        description=".csv, .jsonl or .parquet, a row per object: image (below predict.images), "
        "object, and optionally box ([x, y, width, height] in pixels, or the columns x, y, w, h; "
        "empty: the whole photo) and id (path)",
    )
    object: str | None = Field(
        None,
        description="name of the object, where no table says it; needed unless the model has no "
        "object gate",
    )
    output: str = Field(
        "runs/predictions.jsonl",
        description="file written, .jsonl, .parquet or .csv (path); beside it, if rows could not "
        "be used, NAME.rejects.jsonl with the reasons",
    )
    top_k: int = Field(10, ge=0, description="attributes listed per object, 0: all")
    thresholds: bool = Field(
        False,
        description="also say which of them are present, by the model's thresholds (F1 on "
        "validation)",
    )
    batch_size: int = Field(64, ge=1, description="crops per forward pass")
    threads: int = Field(2, ge=1, description="threads that read, decode and crop")
    max_pixels: int = Field(
        64_000_000, ge=1, description="largest photo decoded (pixels; decompression bombs)"
    )
