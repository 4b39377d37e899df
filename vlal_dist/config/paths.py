"""Where each stage reads and writes: one root per stage, a local path or `s3://bucket/prefix`."""

from pydantic import Field

from vlal_dist.config.section import Section


class PathsSection(Section):
    """Roots of the pipeline; a stage reads one and writes the next, and edits nothing in place."""

    instances: str = Field("runs/vaw/instances", description="root written by clean (URL or path)")
    dataset: str = Field("runs/vaw/dataset", description="root written by pack (URL or path)")
    scores: str = Field("runs/vaw/scores", description="root written by score_clip (URL or path)")
    merged: str = Field("runs/vaw/merged", description="root written by merge (URL or path)")
    resharded: str = Field(
        "runs/vaw/resharded", description="root written by reshard (URL or path)"
    )
    run: str = Field("runs/vaw/run", description="root of one training run (URL or path)")
    export: str = Field("runs/vaw/export", description="root written by export (URL or path)")
    experiments: str = Field(
        "runs/vaw/experiments", description="root of all runs of the experiments (local path)"
    )
    cache: str = Field(
        "runs/cache", description="local folder for index files of remote roots (path)"
    )
