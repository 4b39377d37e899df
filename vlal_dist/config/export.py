"""Knobs of `export`: what a saved model is handed on with."""

from pydantic import Field

from vlal_dist.config.section import Section


class ExportSection(Section):
    """A folder that loads without the dataset: weights, config.json, thresholds, model card."""

    onnx: bool = Field(
        False,
        description="also write model.onnx, and refuse it when onnxruntime computes something else "
        "than torch (pip install '.[onnx]')",
    )
    min_annotated: int = Field(
        10,
        ge=1,
        description="annotated positives, and negatives, on validation from which on an attribute "
        "has a threshold of its own; below, one label moves its F1 too far, and it takes the "
        "threshold of all attributes pooled",
    )
