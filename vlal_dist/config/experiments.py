"""Knobs of the experiments: the paper's tables, repeated over seeds."""

from typing import Annotated

from pydantic import Field

from vlal_dist.config.section import Section

Count = Annotated[int, Field(ge=0, strict=True)]


class ExperimentsSection(Section):
    """Which runs stand behind a table, and how many of them run at a time."""

    seeds: list[Count] = Field(
        default_factory=lambda: [99, 100, 101, 102, 103],
        min_length=1,
        description="training.seed of each repeat; rows of one seed share initial weights and "
        "order (authors: 99)",
    )
    jobs: int = Field(1, ge=1, description="runs at a time on this machine")
    ranks: int = Field(1, ge=1, description="DeepSpeed ranks of each run")
    num_ignores: list[Count] = Field(
        default_factory=lambda: [10, 20, 30, 40, 50],
        description="NUM_IGNORE of the rows of Table 2; 0 and all are always added (attributes)",
    )
    replicates: int = Field(
        1000, ge=1, description="replicates of the bootstrap over test photos (count)"
    )
