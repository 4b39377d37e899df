"""The base of every config section: frozen, unknown keys refused, each field described."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One group of knobs; immutable once read, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
