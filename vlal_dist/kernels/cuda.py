"""The operator on a GPU: programs compiled for the run's settings, launched on torch's stream.

Nothing waits for the device: a launch can be captured in a CUDA graph once its program is loaded,
which the first call does. Arguments are checked by `selective_loss.py`.
"""

import ctypes
import functools
from typing import Any, Unpack

import torch
from torch import Tensor

from vlal_dist.errors import ConfigError
from vlal_dist.kernels import nvrtc
from vlal_dist.kernels.arguments import Asked, Outputs, Tensors
from vlal_dist.kernels.launch import STATIC, THREADS, outputs_for, prepare, prepare_draw


def run(tensors: Tensors, *, largest: int = 0, **asked: Unpack[Asked]) -> Outputs:
    """As `cpu.run`, on the GPU of the logits, which are no float64.

    Args:
        tensors, asked: of `cpu.run`.
        largest: attributes of the greatest feasible set; 0: not known.

    Raises:
        ConfigError: the program cannot be compiled or loaded, or a row is too long.
    """
    logits = tensors["logits"]
    assert logits is not None
    device = logits.device
    if logits.numel() == 0:
        per_row, gradient, sums, counts = outputs_for(tensors)
        return per_row.zero_(), gradient, sums.zero_(), counts.zero_()
    call = prepare(tensors, largest=largest, most_shared=_most_shared(device.index), **asked)
    blocks, shared = call.launch.blocks, call.launch.shared
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        rows, totals = load(call.settings, device.index), load(None, device.index)
        _start(rows, blocks, shared, stream, call.arguments)
        _start(totals, 1, 0, stream, call.arguments, blocks.to_bytes(8, "little"))
    return call.outputs


def draw(
    tensors: Tensors, attributes: int, num_ignore: int, over_unannotated: bool, *, largest: int = 0
) -> Tensor:
    """As `cpu.draw`, on the GPU of the object ids; largest as in `run`."""
    object_id = tensors["object_id"]
    assert object_id is not None
    rows, device = len(object_id), object_id.device
    drawn = object_id.new_full((rows, min(num_ignore, attributes)), -1, dtype=torch.int32)
    if drawn.numel() == 0:
        return drawn
    settings, launch, arguments, _ = prepare_draw(
        {**tensors, "drawn_out": drawn},
        attributes,
        num_ignore,
        over_unannotated,
        largest=largest,
        most_shared=_most_shared(device.index),
    )
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _start(load(settings, device.index), launch.blocks, launch.shared, stream, arguments)
    return drawn


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
    _done(driver.cuFuncSetAttribute(kernel, attribute, _most_shared(device) - STATIC))
    return kernel


def _start(kernel: Any, blocks: int, shared: int, stream: int, *arguments: bytes) -> None:
    held = [ctypes.create_string_buffer(one, len(one)) for one in arguments]
    addresses = (ctypes.c_void_p * len(held))(*(ctypes.addressof(one) for one in held))
    where = ctypes.addressof(addresses)
    _done(_driver().cuLaunchKernel(kernel, blocks, 1, 1, THREADS, 1, 1, shared, stream, where, 0))


@functools.cache
def _most_shared(device: int) -> int:
    """Bytes of shared memory that a block may ask for."""
    driver = _driver()
    name = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_done(driver.cuDeviceGetAttribute(name, _done(driver.cuDeviceGet(device)))))


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
