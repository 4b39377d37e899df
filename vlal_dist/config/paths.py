"""Base of the sections of the configuration, and the section that all programs read: `paths`."""

import os
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


Texts = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""A list of texts; a single text stands for a list of one."""


class PathsConfig(Section):
    """Roots of the pipeline: each stage reads some and writes one, and never edits its input.

    `ROOT` in a default stands for `root`.
    """

    root: str = Field("runs/own", min_length=1)
    """Folder of the roots that are not named below (URL or path)."""
    imported: str = "ROOT/imported"
    """Root written by import (URL or path)."""
    instances: str = "ROOT/instances"
    """Root written by clean (URL or path)."""
    dataset: str = "ROOT/dataset"
    """Root written by pack (URL or path)."""
    scores: str = "ROOT/scores"
    """Root written by score (URL or path)."""
    merged: str = "ROOT/merged"
    """Root written by merge (URL or path)."""
    resharded: str = "ROOT/resharded"
    """Root written by reshard (URL or path)."""
    run: str = "ROOT/run"
    """Root of one training run (URL or path)."""
    export: str = "ROOT/export"
    """Root written by export (URL or path)."""
    experiments: str = "ROOT/experiments"
    """Root of all runs of the experiments (local path; where ROOT is a URL,
    runs/NAME/experiments with its last part)."""
    cache: str = "runs/cache"
    """Local folder for index files of remote roots (path)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_roots(cls, values: Any) -> Any:
        """Add the roots that are not given."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        root = str(values.get("root", fields["root"].default))
        below = {name: str(field.default) for name, field in fields.items() if name != "root"}
        if "://" in root:
            below["experiments"] = f"runs/{root_name(root)}/experiments"
        base = root.rstrip("/") or "/"
        return {name: path.replace("ROOT", base) for name, path in below.items()} | values


def root_name(root: str) -> str:
    """The last part of a folder or URL; of a relative one such as `.`, the folder's own name."""
    path = root if "://" in root else os.path.abspath(os.path.expanduser(root))
    return path.rstrip("/").rpartition("/")[2]
