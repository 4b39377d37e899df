"""All that a run is told, as plain values: `train.py` fills it from the configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Named as the configuration's keys, whose help states units and sources; the others:

    Attributes:
        dataset_url: root of merge, or of pack when likelihoods come from score files.
        scores_url: root of score_clip; None: likelihoods are inside the tars.
        run_url: root that the run writes.
        temperature: tau of Eq. (2) for score files; None: the scorer's.
        num_ignore: NUM_IGNORE; None: all.
        gammas: focusing of POSITIVE, NEGATIVE, FEASIBLE, INFEASIBLE in the selective loss.
        decode_threads: `data.threads`.
        torch_threads: `training.threads`.
        config_text: the resolved configuration, written beside the run.
    """

    dataset_url: str
    scores_url: str | None
    run_url: str
    cache: Path
    config_text: str

    train_split: str
    validation_split: str
    image_size: int
    normalize: bool
    flip: float
    decode: Literal["cpu", "gpu"]
    decode_threads: int
    prefetch_steps: int
    window_blocks: int
    lanes: int
    epoch_end: str
    mix: dict[str, float]
    subset: str | None
    repeat_threshold: float
    damage: Literal["strict", "quarantine"]
    max_quarantined: float
    cache_bytes: int
    decoded_bytes: int

    temperature: float | None
    profile: str
    loss: str
    num_ignore: int | None
    draw_over: str
    draw: str
    draw_weights: str
    gammas: tuple[float, float, float, float]
    margin: float
    detach_focal: bool
    psl_prior: str | None
    psl_threshold: float
    psl_topk: int

    depth: int
    width: int
    weights: str | None
    object_gate: bool

    epochs: int
    max_steps: int | None
    batch_size: int
    accumulation: int
    reference_batch: int
    lr_new: float
    lr_pretrained: float
    weight_decay: float
    schedule: Literal["plateau", "cosine", "constant"]
    plateau_patience: int
    plateau_factor: float
    seed: int
    precision: Literal["auto", "fp32", "bf16"]
    kernel: Literal["auto", "reference"]
    zero_stage: int
    torch_threads: int
    checkpoint_epochs: int
    checkpoint_steps: int
    keep_checkpoints: int
    peer_timeout_s: float
    log_steps: int

    evaluation_batch_size: int
    top_k: int
    threshold: float

    metrics: bool
    metrics_host: str
    metrics_port: int
    targets: str | None
    trackers: list[str]

    @property
    def weighted_by(self) -> str | None:
        """By what ignore sets are drawn; None: they are not, as none or all of a set needs none."""
        draws = self.loss == "selective" and self.num_ignore not in (None, 0)
        return self.draw_weights if draws else None
