"""Knobs of `score_clip`: the vision-language model, its prompts, and where it runs."""

from typing import Literal

from pydantic import Field

from vlal_dist.config.section import Section


class ScoringSection(Section):
    """CLIP similarities over feasible attributes (Sec. 2.2, Eq. 2)."""

    model: str = Field("ViT-B-32-quickgelu", description="open_clip model name (paper: ViT-B/32)")
    model_config_dir: str | None = Field(
        None, description="folder of open_clip model-config JSON files to register (path)"
    )
    weights: str | None = Field(
        None,
        description="local weights, .safetensors (path), or an open_clip tag such as `openai`, "
        "which downloads",
    )
    templates: list[str] = Field(
        default_factory=lambda: ["a photo of {attribute} {object}"],
        description="prompt templates; several are averaged (authors' notebook: one)",
    )
    temperature: float | None = Field(
        None, gt=0, description="tau of Eq. (2); absent: the model's own 1/exp(logit_scale)"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="encoder arithmetic; similarities and softmax are always fp32"
    )
    splits: list[str] = Field(
        default_factory=lambda: ["train"], description="splits scored (the loss needs train only)"
    )
    batch_size: int | None = Field(
        None, ge=1, description="crops per encoder call (samples); absent: a short warm-up chooses"
    )
    decode_threads: int | None = Field(
        None, ge=1, description="decoding threads per actor; absent: a short warm-up chooses"
    )
    compile: bool = Field(
        False, description="run the encoders through torch.compile (needs a compiler on each node)"
    )
    embeddings: str | None = Field(
        None,
        description="finished score root whose stored embeddings are taken instead of images: for "
        "other templates, temperature or feasible sets (path or URL)",
    )
    max_quarantined: float = Field(
        0.001,
        ge=0,
        le=1,
        description="share of the crops that may be unusable before the run stops; above 0, one at "
        "least",
    )
    actors: int = Field(1, ge=1, description="Ray actors")
    gpus_per_actor: float = Field(1.0, ge=0, description="GPUs each actor asks for, device cuda")
    cpus_per_actor: float = Field(0.5, gt=0, description="CPUs each actor asks for")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: on a Ray that was running, cuda (waits for GPUs); else cuda where this "
        "machine has one, else cpu",
    )
    use_ray: bool = Field(True, description="false: score in this process, without Ray")
    max_retries: int = Field(3, ge=0, description="attempts after a lost actor, per shard")
