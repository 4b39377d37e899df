"""Knobs of the supervisor of one machine's job."""

from pydantic import Field

from vlal_dist.config.section import Section


class SuperviseSection(Section):
    """Restarts of a command that failed, and how long its processes may take to end."""

    restarts: int = Field(
        10, ge=0, description="failures in a row after which it is started again; 0: never"
    )
    backoff_s: float = Field(
        1.0, gt=0, description="wait before the first restart; doubles each time, to 60 (seconds)"
    )
    healthy_s: float = Field(
        600.0, gt=0, description="a start that lasted so long ends the row of failures (seconds)"
    )
    grace_s: float = Field(
        120.0,
        gt=0,
        description="time to save and leave, once asked to stop or once the command itself has "
        "ended; what is left is then killed (seconds; above a save, below the scheduler's own)",
    )
