"""The operator on a GPU: programs compiled for the run's settings, launched on torch's stream.

Nothing waits for the device: a launch can be captured in a CUDA graph once its program is loaded,
which the first call does. Arguments are checked by `selective_loss.py`.
"""

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlal_dist.errors import ConfigError
from vlal_dist.kernels import nvrtc
from vlal_dist.kernels.arguments import KINDS, pack

Tensors = dict[str, Tensor | None]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
THREADS = 256
_LONG_ROW = 4096
"""Attributes above which a whole block works on a row."""


class Launch(NamedTuple):
    """How the rows of a batch are laid on the device.

    Attributes:
        team: lanes that work on a row.
        blocks: of `THREADS` threads.
        shared: bytes of shared memory of a block.
        keys_shared: whether the race keys have their place there, or in device memory.
    """

    team: int
    blocks: int
    shared: int
    keys_shared: bool


def plan_launch(*, rows: int, attributes: int, drawable: int, most_shared: int) -> Launch:
    """Teams, blocks and memory for a batch.

    Args:
        rows: B >= 1.
        attributes: A >= 1.
        drawable: attributes of the greatest feasible set; 0 without a draw.
        most_shared: bytes of shared memory that a block can have.

    Raises:
        ConfigError: the codes of one row do not fit, one byte for each attribute.
    """
    team = nvrtc.WARP if attributes <= _LONG_ROW else nvrtc.BLOCK
    teams = THREADS // team
    codes, keys = (attributes + 15) // 16 * 16, (4 * drawable + 15) // 16 * 16
    # A lane counts the codes of four attributes at a time, in bytes.
    if teams * codes + _STATIC > most_shared or attributes > 255 * 4 * team:
        raise ConfigError(f"{attributes} attributes exceed this GPU's shared memory")
    keys_shared = teams * (codes + keys) + _STATIC <= most_shared
    shared = teams * (codes + keys) if keys_shared else teams * codes
    return Launch(team, -(-rows // teams), shared, keys_shared)


_STATIC = 1024
"""Shared memory that the program itself declares, at most."""


class Prepared(NamedTuple):
    """A call, ready to be launched.

    Attributes:
        settings: what the program of the rows is compiled for.
        launch: how it is launched; the program of the totals is one block.
        arguments: of both programs.
        outputs: losses, gradient, sums and counts, not written yet.
        held: what must live until the launch.
    """

    settings: nvrtc.Settings
    launch: Launch
    arguments: bytes
    outputs: Outputs
    held: list[Tensor]


def prepare(
    tensors: Tensors,
    *,
    mode: str,
    num_ignore: int,
    over_unannotated: bool,
    gammas: tuple[float, float, float, float],
    margin: float,
    detach_focal: bool,
    largest: int,
    most_shared: int,
) -> Prepared:
    """Outputs and arguments of a batch that is not empty.

    Args:
        tensors, mode, num_ignore, over_unannotated, gammas, margin, detach_focal, largest: of `run`.
        most_shared: bytes of shared memory that a block can have.

    Raises:
        ConfigError: a row is too long.
    """
    logits = tensors["logits"]
    assert logits is not None
    rows, attributes = logits.shape
    drawable = (largest or attributes) if mode == "draw" and num_ignore > 0 else 0
    launch = plan_launch(
        rows=rows, attributes=attributes, drawable=drawable, most_shared=most_shared
    )
    outputs = _outputs(tensors)
    made = dict(zip(("per_row", "gradient", "sums", "counts"), outputs, strict=True))
    made["partial"] = logits.new_empty(launch.blocks, 9, dtype=torch.float32)
    if not launch.keys_shared:
        made["keys"] = logits.new_empty(rows, drawable, dtype=torch.int32)
    arguments = pack(
        {**tensors, **made},
        mode=mode,
        num_ignore=num_ignore,
        over_unannotated=over_unannotated,
        gammas=gammas,
        margin=margin,
        detach_focal=detach_focal,
        largest=drawable,
    )
    settings = nvrtc.Settings(
        KINDS[logits.dtype], mode, tuple(gammas), margin, detach_focal, launch.team
    )
    return Prepared(settings, launch, arguments, outputs, list(made.values()))


def run(
    tensors: Tensors,
    *,
    mode: str,
    num_ignore: int,
    over_unannotated: bool,
    gammas: tuple[float, float, float, float],
    margin: float,
    detach_focal: bool,
    largest: int = 0,
) -> Outputs:
    """As `cpu.run`, on the GPU of the logits, which are no float64.

    Args:
        tensors, mode, num_ignore, over_unannotated, gammas, margin, detach_focal: of `cpu.run`.
        largest: attributes of the greatest feasible set; 0: not known.

    Raises:
        ConfigError: the program cannot be compiled or loaded, or a row is too long.
    """
    logits = tensors["logits"]
    assert logits is not None
    device = logits.device
    if logits.numel() == 0:
        per_row, gradient, sums, counts = _outputs(tensors)
        return per_row.zero_(), gradient, sums.zero_(), counts.zero_()
    call = prepare(
        tensors,
        mode=mode,
        num_ignore=num_ignore,
        over_unannotated=over_unannotated,
        gammas=gammas,
        margin=margin,
        detach_focal=detach_focal,
        largest=largest,
        most_shared=_most_shared(device.index),
    )
    blocks, shared = call.launch.blocks, call.launch.shared
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        rows, totals = load(call.settings, device.index), load(None, device.index)
        _start(rows, blocks, shared, stream, call.arguments)
        _start(totals, 1, 0, stream, call.arguments, blocks.to_bytes(8, "little"))
    return call.outputs


@functools.cache
def load(settings: nvrtc.Settings | None, device: int) -> Any:
    """The kernel of the rows, or without settings that of the totals, compiled if need be.

    Raises:
        ConfigError: it cannot be compiled or loaded.
    """
    driver = _driver()
    major, minor = torch.cuda.get_device_capability(device)
    defines = settings.defines() if settings else nvrtc.TOTALS
    cubin = nvrtc.compiled(defines, f"sm_{major}{minor}").read_bytes()
    torch.cuda.current_stream(device).synchronize()  # torch's context is there and current
    module = _done(driver.cuModuleLoadData(cubin))
    name = b"vlal_rows" if settings else b"vlal_totals"
    kernel = _done(driver.cuModuleGetFunction(module, name))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _done(driver.cuFuncSetAttribute(kernel, attribute, _most_shared(device) - _STATIC))
    return kernel


def _outputs(tensors: Tensors) -> Outputs:
    logits, gradient = tensors["logits"], tensors.get("gradient")
    assert logits is not None
    return (
        logits.new_empty(len(logits), dtype=torch.float32),
        logits.new_empty(logits.shape) if gradient is None else gradient,
        logits.new_empty(5, dtype=torch.float64),
        logits.new_empty(5, dtype=torch.int64),
    )


def _start(kernel: Any, blocks: int, shared: int, stream: int, *arguments: bytes) -> None:
    held = [ctypes.create_string_buffer(one, len(one)) for one in arguments]
    addresses = (ctypes.c_void_p * len(held))(*(ctypes.addressof(one) for one in held))
    where = ctypes.addressof(addresses)
    _done(_driver().cuLaunchKernel(kernel, blocks, 1, 1, THREADS, 1, 1, shared, stream, where, 0))


@functools.cache
def _most_shared(device: int) -> int:
    """Bytes of shared memory that a block may ask for."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ConfigError(f"no cuda.bindings ({error}); install torch's CUDA build") from None
    return driver


def _done(answer: tuple[Any, ...]) -> Any:
    """What a call of the driver gives.

    Raises:
        ConfigError: it failed.
    """
    status, *values = answer
    if status.value != 0:
        raise ConfigError(f"the CUDA driver answers {status.name}")
    return values[0] if values else None
