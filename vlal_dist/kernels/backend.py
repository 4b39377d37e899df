"""Which backend does the work, and why.

The fastest that works is used: a missing compiler never breaks a run, it is said once.
`VLAL_KERNEL` forces one of `BACKENDS`; then its absence is an error.
"""

import functools
import logging
import os
from typing import NamedTuple

from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cpu
from vlal_dist.kernels.build import instruction_set

logger = logging.getLogger(__name__)

VARIABLE = "VLAL_KERNEL"
BACKENDS = ("cpu", "reference")


class Chosen(NamedTuple):
    """A backend and why it was taken."""

    name: str
    why: str


@functools.cache
def choose(device: str) -> Chosen:
    """The backend for tensors of a device type.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: `VLAL_KERNEL` names none, or one that does not work here.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", *BACKENDS):
        raise ConfigError(f"{VARIABLE}={forced} is none of {', '.join(BACKENDS)}; unset it")
    if forced == "reference":
        return Chosen("reference", f"{VARIABLE} says so")
    if device != "cpu":
        if forced:
            raise ConfigError(f"{VARIABLE}={forced} does not work on {device}; unset it")
        return Chosen("reference", f"there is no fused operator for {device} yet")
    try:
        cpu.load(instruction_set())
    except (ConfigError, OSError) as error:
        if forced:
            raise ConfigError(f"{VARIABLE}={forced}: {error}") from None
        logger.warning("the selective loss runs by its readable reference: %s", error)
        return Chosen("reference", str(error))
    return Chosen("cpu", f"compiled for {instruction_set()}")
