"""GPU backend of the selective loss: compile with NVRTC, choose a launch, run on torch's stream.

Compiling needs no GPU and no toolkit. The options of a loss are constants of the program: powers
become a few multiplications, and unused branches disappear.

Nothing waits for the device: a launch can be captured in a CUDA graph once its program is loaded,
which the first call does. Shapes were checked by `operator.selective_loss`; the programs check
values, and end in a device-side assertion that names what is wrong.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels.arguments import KINDS, MODES, OPTIONS, SOURCES, Outputs, Tensors, pack
from vlal_dist.kernels.cpu import digest_of, kept

WARP, BLOCK = 32, 256
"""Lanes of a team: short rows get a warp each, long ones a block."""
TOTALS = ("-DVLAL_TOTALS", f"-DVLAL_TEAM={BLOCK}")
"""Defines of the program that adds up the sums of the other one's blocks."""
# No contraction: the draw's bits are single multiplications and additions, as on the CPU.
_OPTIONS = ("--std=c++17", "--fmad=false")


@functools.cache
def program(kind: int, mode: str, loss: LossConfig, team: int) -> tuple[str, ...]:
    """Defines of the program for a type of logits, a form of the ignored pairs and a loss.

    Args:
        kind: of the logits, a value of `arguments.KINDS`.
        mode: a name of `arguments.MODES`.
        loss: its `options` become constants.
        team: `WARP` or `BLOCK`.
    """
    return (
        f"-DVLAL_KIND={kind}",
        f"-DVLAL_MODE={MODES[mode]}",
        f"-DVLAL_TEAM={team}",
        OPTIONS,
        *(f"-DVLAL_{name}={float(value)!r}f" for name, value in loss.options.items()),
    )


def compiled(defines: tuple[str, ...], architecture: str) -> Path:
    """The program for a GPU, compiled unless it is in the cache.

    Args:
        defines: `program(...)`, or `TOTALS`.
        architecture: such as `sm_90`.

    Raises:
        ConfigError: NVRTC is missing or fails, or the cache cannot be written.
    """
    digest = digest_of(_OPTIONS, defines, version())

    def make(target: Path) -> None:
        target.write_bytes(compile_program(defines, architecture)[0])

    return kept(f"cuda-{architecture}-{digest}.cubin", make)


def compile_program(
    defines: tuple[str, ...], architecture: str, *, source: bytes = b'#include "cuda.cu"'
) -> tuple[bytes, str]:
    """The program's bytes, and the assembler's log, which lists registers and spills.

    Args:
        defines, architecture: of `compiled`.
        source: CUDA C++ that may include the sources by name.

    Raises:
        ConfigError: NVRTC is missing or fails.
    """
    nvrtc = _nvrtc()
    headers = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cu"))
    status, program = nvrtc.nvrtcCreateProgram(
        source,
        b"program.cu",
        len(headers),
        [path.read_bytes() for path in headers],
        [path.name.encode() for path in headers],
    )
    _check(status)
    try:
        options = [
            *(f"--gpu-architecture={architecture}", "--ptxas-options=-v"),
            *(*_OPTIONS, *defines),
        ]
        (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        status, size = nvrtc.nvrtcGetProgramLogSize(program)
        _check(status)
        log = bytearray(size)
        _check(*nvrtc.nvrtcGetProgramLog(program, log))
        text = bytes(log).decode(errors="replace").strip("\0\n")
        if failed != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            lines = [line for line in text.splitlines() if "error" in line]
            raise ConfigError(f"NVRTC for {architecture}: {(lines or [failed.name])[0][:300]}")
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(status)
        cubin = bytearray(size)
        _check(*nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin), text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def version() -> str:
    """Version of NVRTC.

    Raises:
        ConfigError: there is none.
    """
    status, major, minor = _nvrtc().nvrtcVersion()
    _check(status)
    return f"{major}.{minor}"


def _check(status: object) -> None:
    if getattr(status, "value", 0) != 0:
        raise ConfigError(f"NVRTC failed: {status}")


def _nvrtc() -> Any:
    """The bindings, which a build of torch without CUDA does not bring.

    Raises:
        ConfigError: they or the library are missing.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(f"no NVRTC ({error}); install torch's CUDA build") from None
    return nvrtc


THREADS = 256
_LONG_ROW = 4096
"""Attributes above which a whole block works on a row."""


class Launch(NamedTuple):
    """How the rows of a batch are laid on the device.

    Attributes:
        team: lanes that work on a row.
        blocks: of `THREADS` threads.
        shared: bytes of shared memory of a block.
        keys_shared: whether the race keys lie there, or in device memory.
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
    team = WARP if attributes <= _LONG_ROW else BLOCK
    teams = THREADS // team
    codes, keys = (attributes + 15) // 16 * 16, (4 * drawable + 15) // 16 * 16
    # A lane counts the codes of four attributes at a time, in bytes.
    if teams * codes + STATIC > most_shared or attributes > 255 * 4 * team:
        raise ConfigError(f"{attributes} attributes exceed this GPU's shared memory")
    keys_shared = teams * (codes + keys) + STATIC <= most_shared
    shared = teams * (codes + keys) if keys_shared else teams * codes
    return Launch(team, -(-rows // teams), shared, keys_shared)


STATIC = 1024
"""Most bytes of shared memory that the program itself declares."""


class Prepared(NamedTuple):
    """A call, ready to be launched.

    Attributes:
        defines: of the program of the rows.
        launch: how it is launched; the program of the totals is one block.
        arguments: of both programs.
        outputs: losses, gradient, sums and counts, not written yet.
        held: tensors that must live until the launch.
    """

    defines: tuple[str, ...]
    launch: Launch
    arguments: bytes
    outputs: Outputs
    held: list[Tensor]


def prepare(
    tensors: Tensors, mode: str, loss: LossConfig, largest: int, *, most_shared: int
) -> Prepared:
    """Outputs and arguments of a batch that is not empty.

    Args:
        tensors, mode, loss, largest: of `run`.
        most_shared: bytes of shared memory that a block can have.

    Raises:
        ConfigError: a row is too long.
    """
    logits = tensors["logits"]
    assert logits is not None
    rows, attributes = logits.shape
    draws = mode == "draw" and loss.num_ignore not in (0, "all")
    drawable = (largest or attributes) if draws else 0
    launch = plan_launch(
        rows=rows, attributes=attributes, drawable=drawable, most_shared=most_shared
    )
    outputs = outputs_for(logits, tensors.get("gradient"))
    made = dict(zip(("per_row", "gradient", "sums", "counts"), outputs, strict=True))
    made["partial"] = logits.new_empty(launch.blocks, 10, dtype=torch.float32)
    if not launch.keys_shared:
        made["keys"] = logits.new_empty(rows, drawable, dtype=torch.int32)
    arguments = pack({**tensors, **made}, mode, loss, largest=drawable)
    defines = program(KINDS[logits.dtype], mode, loss, launch.team)
    return Prepared(defines, launch, arguments, outputs, list(made.values()))


def outputs_for(logits: Tensor, gradient: Tensor | None = None) -> Outputs:
    """Losses, gradient (the tensor given, if any), sums and counts, to be written."""
    return (
        logits.new_empty(len(logits), dtype=torch.float32),
        logits.new_empty(logits.shape) if gradient is None else gradient,
        logits.new_empty(5, dtype=torch.float64),
        logits.new_empty(5, dtype=torch.int64),
    )


def run(tensors: Tensors, mode: str, loss: LossConfig, largest: int = 0) -> Outputs:
    """As `cpu.run`, on the GPU of the logits.

    Args:
        tensors, mode, loss: of `cpu.run`.
        largest: attributes of the largest feasible set; 0: unknown.

    Raises:
        ConfigError: the program cannot be compiled or loaded, or a row is too long.
        RuntimeError: values that are not allowed, at the next call that waits for the device
            ("device-side assert triggered"); standard error then holds what is wrong.
    """
    logits = tensors["logits"]
    assert logits is not None
    device = logits.device
    if logits.numel() == 0:
        per_row, gradient, sums, counts = outputs_for(logits)
        return per_row.zero_(), gradient, sums.zero_(), counts.zero_()
    call = prepare(tensors, mode, loss, largest, most_shared=_most_shared(device.index))
    blocks, shared = call.launch.blocks, call.launch.shared
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        rows, totals = load(call.defines, device.index), load(TOTALS, device.index)
        _start(rows, blocks, shared, stream, call.arguments)
        _start(totals, 1, 0, stream, call.arguments, blocks.to_bytes(8, "little"))
    return call.outputs


@functools.cache
def load(defines: tuple[str, ...], device: int) -> Any:
    """The kernel of a program, compiled if need be.

    Raises:
        ConfigError: it cannot be compiled or loaded.
    """
    driver = _driver()
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compiled(defines, f"sm_{major}{minor}").read_bytes()
    torch.cuda.current_stream(device).synchronize()  # torch's context is there and current
    module = _done(driver.cuModuleLoadData(cubin))
    name = b"vlal_totals" if defines == TOTALS else b"vlal_rows"
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
    """Most bytes of shared memory that a block can have."""
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
    """The result of a driver call.

    Raises:
        ConfigError: it failed.
    """
    status, *values = answer
    if status.value != 0:
        raise ConfigError(f"the CUDA driver failed: {status.name}")
    return values[0] if values else None
