"""Knobs of training: Sec. 3.2 of the paper and the authors' configs."""

from typing import Literal

from pydantic import Field

from vlal_dist.config.section import Section


class TrainingSection(Section):
    """Optimiser, schedule, batch, checkpoints."""

    epochs: int = Field(12, ge=1, description="passes over the training split (Sec. 3.2)")
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps (smoke)")
    batch_size: int = Field(64, ge=1, description="global batch B (samples; Sec. 3.2)")
    accumulation: int = Field(1, ge=1, description="micro-batches per rank, at first start")
    reference_batch: int = Field(
        64, ge=1, description="B at which the loss is the authors' plain sum (design 5)"
    )
    lr_new: float = Field(7e-4, gt=0, description="learning rate of new layers (Sec. 3.2)")
    lr_pretrained: float = Field(1e-5, gt=0, description="learning rate of the backbone (Sec. 3.2)")
    weight_decay: float = Field(
        1e-4, ge=0, description="coupled L2, off for biases and norms (authors' code)"
    )
    schedule: Literal["plateau", "cosine", "constant"] = Field(
        "plateau", description="learning-rate schedule on validation mAP (authors: plateau)"
    )
    plateau_patience: int = Field(2, ge=0, description="epochs without gain before a cut (authors)")
    plateau_factor: float = Field(0.1, gt=0, lt=1, description="cut of the rate (authors)")
    seed: int = Field(99, ge=0, description="order, draws, flips, initial weights (authors: 99)")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast on GPU, fp32 on CPU (design 8)"
    )
    kernel: Literal["auto", "reference"] = Field(
        "auto", description="selective loss: fastest backend that works, or the readable one"
    )
    zero_stage: Literal[0, 1, 2] = Field(0, description="DeepSpeed ZeRO stage (design 8)")
    threads: int = Field(0, ge=0, description="torch threads per rank, 0: cores / local ranks")
    checkpoint_epochs: int = Field(1, ge=1, description="epochs between checkpoints")
    checkpoint_steps: int = Field(
        0, ge=0, description="steps between checkpoints within an epoch, 0: none"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept beside the best")
    peer_timeout_s: float = Field(
        600.0,
        gt=0,
        description="longest wait of a rank for another, seconds; a rank that hangs ends the job "
        "after it (must exceed the time of a save and of a step)",
    )
    log_steps: int = Field(20, ge=1, description="steps between log lines and metric updates")
