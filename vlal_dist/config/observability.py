"""Knobs of what Prometheus and trackers are told."""

from typing import Literal

from pydantic import Field

from vlal_dist.config.section import Section


class ObservabilitySection(Section):
    """Endpoints of training ranks, files of every program; trackers. Local unless told."""

    metrics: bool = Field(True, description="serve /metrics on each rank")
    metrics_host: str = Field("127.0.0.1", description="address the endpoint binds to")
    metrics_port: int = Field(
        9400, ge=1, le=65000, description="port of local rank 0; the next free one if taken"
    )
    targets: str | None = Field(
        None,
        min_length=1,
        description="local folder in which each rank tells Prometheus its endpoint (file_sd)",
    )
    textfiles: str | None = Field(
        None,
        min_length=1,
        description="local folder of node_exporter's textfile collector, in which every program "
        "says how it ended, and pack what it counts",
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"],
        description="where training's numbers go beside metrics.jsonl; wandb and mlflow as WANDB_* "
        "and MLFLOW_* variables say (docs/operations.md)",
    )
