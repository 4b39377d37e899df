"""Knobs of the method: Secs. 2.2-2.3 of the paper, and the baselines of Table 1."""

from typing import Annotated, Literal

from pydantic import Field

from vlal_dist.config.section import Section


class MethodSection(Section):
    """The loss: which terms, which exponents, and how many attributes are ignored."""

    profile: Literal["paper", "released", "corrected"] = Field(
        "paper", description="named set of defaults over all sections; an explicit key overrides it"
    )
    loss: Literal[
        "selective", "ce_ignoring", "ce_negatifying", "asl_ignoring", "asl_negatifying", "psl"
    ] = Field("selective", description="row of Table 1")
    num_ignore: Annotated[int, Field(ge=0, strict=True)] | Literal["all"] = Field(
        30, description="NUM_IGNORE, attributes drawn per visit (Fig. 3, Table 2), or all"
    )
    draw_over: Literal["feasible", "unannotated"] = Field(
        "feasible", description="drawing set: all feasible (Fig. 3) or only unannotated feasible"
    )
    draw: Literal["random", "top"] = Field(
        "random",
        description="ablation of loss selective: NUM_IGNORE drawn anew at each visit (Fig. 3), or "
        "the top ones by weight, the same at every visit (ties: lower attribute id)",
    )
    draw_weights: Literal["likelihood", "uniform", "cooccurrence"] = Field(
        "likelihood",
        description="ablation of loss selective: the draw is weighted by CLIP (Eq. (2)), not at "
        "all, or by how often attribute and object were annotated present together, plus 1; the "
        "last two need neither scores nor merge (data.likelihood scores reads paths.dataset)",
    )
    gamma_positive: float = Field(1.0, ge=0, description="focusing, annotated present (Sec. 3.2)")
    gamma_negative: float = Field(2.0, ge=0, description="focusing, annotated absent (Sec. 3.2)")
    gamma_feasible: float = Field(4.0, ge=0, description="focusing, feasible (Sec. 3.2)")
    gamma_infeasible: float = Field(7.0, ge=0, description="focusing, infeasible (Sec. 3.2)")
    margin: float = Field(
        0.05, ge=0, lt=1, description="probability margin of negatives (authors' code, all rows)"
    )
    detach_focal: bool = Field(
        True, description="no gradient through the focal weight (authors' code)"
    )
    psl_prior: str | None = Field(
        None,
        description="attributes.parquet of `evaluate --evaluation.split train` on the CE-ignoring "
        "model (URL or path; needed by loss psl)",
    )
    psl_threshold: float = Field(0.5, ge=0, le=1, description="prior above which PSL ignores")
    psl_topk: int = Field(5, ge=0, description="unannotated ignored per row by PSL, over the batch")
