"""Compile the CUDA operator for a run's settings, with the NVRTC that torch's CUDA build brings.

It needs no GPU and no toolkit. The settings of a run are constants of the program: powers become a
few multiplications, and what a setting does not need is not there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlal_dist.errors import ConfigError
from vlal_dist.kernels.arguments import MODES, Asked
from vlal_dist.kernels.build import SOURCES, digest_of, kept

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
