"""The selective loss on a GPU: compile with NVRTC, choose a launch, run on torch's stream.

It needs no GPU and no toolkit. The settings of a run are constants of the program: powers become a
few multiplications, and what a setting does not need is not there.

Nothing here touches a GPU, so that the emulated programs of the tests are launched the same way.

Nothing waits for the device: a launch can be captured in a CUDA graph once its program is loaded,
which the first call does. Arguments are checked by `selective_loss.py`.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from vlal_dist.errors import ConfigError
from vlal_dist.kernels.arguments import KINDS, MODES, Asked, Outputs, Tensors, draw_alone, pack
from vlal_dist.kernels.cpu import SOURCES, digest_of, kept

WARP, BLOCK = 32, 256
"""Lanes of a team: short rows get a warp each, long ones a block."""
TOTALS = ("-DVLAL_TOTALS", f"-DVLAL_TEAM={BLOCK}")
"""Defines of the program that adds up what the blocks of the other one left."""
# No contraction: the draw's bits are single multiplications and additions, as on the CPU.
_OPTIONS = ("--std=c++17", "--fmad=false")


@dataclass(frozen=True)
class Settings:
    """What a program is compiled for.

    Attributes:
        kind: of the logits, an entry of `arguments.KINDS` below float64.
        mode: a name of `arguments.MODES`.
        gammas, margin, detach_focal: of the loss.
        team: `WARP` or `BLOCK`.
    """

    kind: int
    mode: str
    gammas: tuple[float, float, float, float]
    margin: float
    detach_focal: bool
    team: int

    @classmethod
    def of(cls, asked: Asked, *, kind: int, team: int) -> "Settings":
        """Those of a call."""
        loss = (asked["gammas"], asked["margin"], asked["detach_focal"])
        return cls(kind, asked["mode"], *loss, team)

    def defines(self) -> tuple[str, ...]:
        """As the compiler takes them."""
        names = ("POSITIVE", "NEGATIVE", "FEASIBLE", "INFEASIBLE")
        gammas = (
            f"-DVLAL_GAMMA_{name}={gamma!r}f"
            for name, gamma in zip(names, map(float, self.gammas), strict=True)
        )
        return (
            f"-DVLAL_KIND={self.kind}",
            f"-DVLAL_MODE={MODES[self.mode]}",
            *gammas,
            f"-DVLAL_MARGIN={float(self.margin)!r}f",
            f"-DVLAL_DETACH={'true' if self.detach_focal else 'false'}",
            f"-DVLAL_TEAM={self.team}",
        )


def compiled(defines: tuple[str, ...], architecture: str) -> Path:
    """The program for a GPU, compiled unless it is in the cache.

    Args:
        defines: `Settings.defines()`, or `TOTALS`.
        architecture: such as `sm_90`.

    Raises:
        ConfigError: NVRTC is missing or fails, or the cache cannot be written.
    """
    digest = digest_of(_OPTIONS, defines, version())
    name = f"cuda-{architecture}-{digest}.cubin"
    return kept(name, lambda target: _write(target, compile_program(defines, architecture)[0]))


def compile_program(
    defines: tuple[str, ...], architecture: str, *, source: bytes = b'#include "cuda.cu"'
) -> tuple[bytes, str]:
    """The program's bytes, and what the assembler says of registers and spills.

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
        told = bytes(log).decode(errors="replace").strip("\0\n")
        if failed != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            lines = [line for line in told.splitlines() if "error" in line]
            raise ConfigError(f"NVRTC for {architecture}: {(lines or [failed.name])[0][:300]}")
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(status)
        cubin = bytearray(size)
        _check(*nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin), told
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def version() -> str:
    """Of NVRTC.

    Raises:
        ConfigError: there is none.
    """
    status, major, minor = _nvrtc().nvrtcVersion()
    _check(status)
    return f"{major}.{minor}"


def _write(target: Path, cubin: bytes) -> None:
    target.write_bytes(cubin)


def _check(status: object) -> None:
    if getattr(status, "value", 0) != 0:
        raise ConfigError(f"NVRTC fails: {status}")


def _nvrtc() -> Any:
    """The bindings; imported here, as a build of torch without CUDA does not bring them.

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

    settings: Settings
    launch: Launch
    arguments: bytes
    outputs: Outputs
    held: list[Tensor]


def prepare(
    tensors: Tensors, *, largest: int, most_shared: int, **asked: Unpack[Asked]
) -> Prepared:
    """Outputs and arguments of a batch that is not empty.

    Args:
        tensors, largest, asked: of `cuda.run`.
        most_shared: bytes of shared memory that a block can have.

    Raises:
        ConfigError: a row is too long.
    """
    logits = tensors["logits"]
    assert logits is not None
    rows, attributes = logits.shape
    draws = asked["mode"] == "draw" and asked["num_ignore"] > 0
    drawable = (largest or attributes) if draws else 0
    launch = plan_launch(
        rows=rows, attributes=attributes, drawable=drawable, most_shared=most_shared
    )
    outputs = outputs_for(tensors)
    made = dict(zip(("per_row", "gradient", "sums", "counts"), outputs, strict=True))
    made["partial"] = logits.new_empty(launch.blocks, 9, dtype=torch.float32)
    if not launch.keys_shared:
        made["keys"] = logits.new_empty(rows, drawable, dtype=torch.int32)
    arguments = pack({**tensors, **made}, attributes=attributes, largest=drawable, **asked)
    settings = Settings.of(asked, kind=KINDS[logits.dtype], team=launch.team)
    return Prepared(settings, launch, arguments, outputs, list(made.values()))


def prepare_draw(
    tensors: Tensors,
    attributes: int,
    num_ignore: int,
    over_unannotated: bool,
    *,
    largest: int,
    most_shared: int,
) -> tuple[Settings, Launch, bytes, list[Tensor]]:
    """Program, launch, arguments and what must live until then, of a draw without a loss."""
    object_id = tensors["object_id"]
    assert object_id is not None
    drawable, rows = largest or attributes, len(object_id)
    launch = plan_launch(
        rows=rows, attributes=attributes, drawable=drawable, most_shared=most_shared
    )
    made: dict[str, Tensor] = {}
    if not launch.keys_shared:
        made["keys"] = object_id.new_empty(rows, drawable, dtype=torch.int32)
    asked = draw_alone(num_ignore, over_unannotated)
    arguments = pack({**tensors, **made}, attributes=attributes, largest=drawable, **asked)
    settings = Settings.of(asked, kind=0, team=launch.team)
    return settings, launch, arguments, list(made.values())


def outputs_for(tensors: Tensors) -> Outputs:
    """Losses, gradient, sums and counts, to be written."""
    logits, gradient = tensors["logits"], tensors.get("gradient")
    assert logits is not None
    return (
        logits.new_empty(len(logits), dtype=torch.float32),
        logits.new_empty(logits.shape) if gradient is None else gradient,
        logits.new_empty(5, dtype=torch.float64),
        logits.new_empty(5, dtype=torch.int64),
    )


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
def load(settings: Settings | None, device: int) -> Any:
    """The kernel of the rows, or without settings that of the totals, compiled if need be.

    Raises:
        ConfigError: it cannot be compiled or loaded.
    """
    driver = _driver()
    major, minor = torch.cuda.get_device_capability(device)
    defines = settings.defines() if settings else TOTALS
    cubin = compiled(defines, f"sm_{major}{minor}").read_bytes()
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
