"""Choice of the backend: the fastest that works.

A missing compiler, NVRTC or driver is logged once and the PyTorch implementation used instead.
`VLAL_KERNEL` forces one of `BACKENDS`; then its absence is an error.
"""

import functools
import logging
import os
from typing import NamedTuple

import torch

from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cpu, cuda

logger = logging.getLogger(__name__)

VARIABLE = "VLAL_KERNEL"
BACKENDS = ("cpu", "cuda", "reference")


class Chosen(NamedTuple):
    """A backend and the reason for it."""

    name: str
    why: str


@functools.cache
def choose(device: str) -> Chosen:
    """The backend for tensors of a device type.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: `VLAL_KERNEL` is unknown, or a backend that does not work here.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", *BACKENDS):
        raise ConfigError(
            f"{VARIABLE} is {forced!r}; give one of {', '.join(BACKENDS)}, or unset it"
        )
    if forced == "reference":
        return Chosen("reference", f"set by {VARIABLE}")
    if forced not in ("", device):
        raise ConfigError(f"{VARIABLE}={forced} does not work on {device}; unset it")
    if device not in BACKENDS:
        return Chosen("reference", f"there is no fused operator for {device}")
    try:
        return Chosen(device, _try_cpu() if device == "cpu" else _try_cuda())
    except (ConfigError, OSError, RuntimeError) as error:  # torch and the driver raise the last
        if forced:
            raise ConfigError(f"{VARIABLE}={forced}: {error}") from None
        logger.warning("selective loss: using the PyTorch reference (%s)", error)
        return Chosen("reference", str(error))


def _try_cpu() -> str:
    cpu.load(cpu.instruction_set())
    return f"compiled for {cpu.instruction_set()}"


def _try_cuda() -> str:
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU")
    cuda.load(cuda.TOTALS, torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability()
    return f"compiled for sm_{major}{minor} by NVRTC {cuda.version()}"
