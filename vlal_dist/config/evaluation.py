"""Knobs of evaluation and of the report (Sec. 3.1, Fig. 4)."""

from typing import Literal

from pydantic import Field

from vlal_dist.config.section import Section


class EvaluationSection(Section):
    """What is evaluated, and what the page shows."""

    split: str = Field("test", description="split evaluated")
    predictor: Literal["model", "constant", "clip"] = Field(
        "model", description="the run's best model, a constant score, or zero-shot CLIP similarity"
    )
    batch_size: int = Field(128, ge=1, description="samples per forward pass and rank")
    top_k: int = Field(15, ge=1, description="attributes per crop in mR@k and F1@k (VAW)")
    threshold: float = Field(0.5, ge=0, le=1, description="score above which mA counts a positive")
    truth: str | None = Field(
        None,
        description="complete labels, Parquet: instance_id, positive names (path; rendered data "
        "only): also gives mAP on complete labels",
    )
    examples: int = Field(12, ge=0, description="crops in the page's Fig. 4 grid")
    example_attributes: int = Field(10, ge=1, description="attributes listed per crop (Fig. 4)")
    curves: int = Field(
        4, ge=0, description="precision-recall curves of each kind on the page (best, worst, ...)"
    )
    experiments: str | None = Field(
        None, description="root of vlal_dist.experiments whose tables the page shows (URL or path)"
    )
    compare: list[str] = Field(
        default_factory=list,
        description="result.json files of other runs, shown as further rows of the result table "
        "(URLs or paths)",
    )
