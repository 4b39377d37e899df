"""The CUDA programs as NVRTC and nvcc compile them for every architecture, without a GPU.

Registers, spills and instructions have budgets: a program that outgrows them is slow on a GPU,
which nothing else would show here.
"""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fixtures.loss_batches import loss_config
from tests.fixtures.wide_matrix import some_of
from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cuda
from vlal_dist.kernels.cpu import SOURCES

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
REGISTERS = 64
"""Four blocks of 256 threads on an SM: 65,536 / 64 / 256."""


def each(architectures: tuple[str, ...]) -> list[object]:
    """Those to compile for; in the default run sm_90 alone, as all take half a minute."""
    marks = [[] if name == "sm_90" else [pytest.mark.slow] for name in architectures]
    return [pytest.param(n, marks=m) for n, m in zip(architectures, marks, strict=True)]


def program(mode="draw", *, kind=0, team=cuda.WARP, margin=0.05, detach_focal=True, **gammas):
    """Defines of a program."""
    loss = loss_config(margin=margin, detach_focal=detach_focal, **gammas)
    return cuda.program(kind, mode, loss, team)


@pytest.fixture(autouse=True)
def _there():
    try:
        cuda.version()
    except ConfigError as error:
        pytest.skip(str(error))


def resources(log: str) -> tuple[int, int, int]:
    """Registers, and bytes spilled and loaded back, as the assembler says."""
    found = [
        int(re.search(pattern, log)[1])
        for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill st", r"(\d+) bytes spill lo")
    ]
    return tuple(found)


def assert_within_budget(defines: tuple[str, ...], architecture: str) -> None:
    cubin, log = cuda.compile_program(defines, architecture)
    assert cubin[:4] == b"\x7fELF" and b"vlal_rows" in cubin
    registers, *spilled = resources(log)
    assert registers <= REGISTERS and spilled == [0, 0], defines


@pytest.mark.parametrize("architecture", each(ARCHITECTURES))
@pytest.mark.parametrize("team", [cuda.WARP, cuda.BLOCK])
def test_registers_and_spills(team, architecture):
    for kind in (0, 1):
        assert_within_budget(program(kind=kind, team=team), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
@pytest.mark.parametrize("kind", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"margin": 0.0, "detach_focal": False},
        {"margin": 0.0, "gammas": (0.0,) * 4, "mode": "ignore"},
        {"gammas": (0.5, 3.3, 0.2, 7.5), "detach_focal": False, "mode": "mask"},
    ],
)
def test_registers_of_other_settings(changes, kind, architecture):
    assert_within_budget(program(kind=kind, **changes), architecture)


@pytest.mark.parametrize("architecture", each(ARCHITECTURES))
def test_totals(architecture):
    _, log = cuda.compile_program(cuda.TOTALS, architecture)
    registers, *spilled = resources(log)
    assert registers <= REGISTERS and spilled == [0, 0]


def disassembler() -> str:
    """NVIDIA's, from the path or from the Triton that torch brings."""
    found = shutil.which("nvdisasm")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(beside) if beside.exists() else None
    if found is None:
        pytest.skip("no nvdisasm, neither in PATH nor with triton")
    return found


def disassembled(cubin: bytes, folder: Path) -> list[str]:
    file = folder / "program.cubin"
    file.write_bytes(cubin)
    return subprocess.run(
        [disassembler(), "-c", str(file)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def main_loop(cubin: bytes, folder: Path) -> list[str]:
    """Instructions of the innermost loop that loads four logits and stores four gradients."""
    places: dict[str, int] = {}
    instructions: list[str] = []
    for line in map(str.strip, disassembled(cubin, folder)):
        if label := re.match(r"(\.L_\w+):", line):
            places[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for place, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if target and places[target[1]] < place:
            loops.append(instructions[places[target[1]] : place + 1])
    fitting = [
        loop
        for loop in loops
        if count(loop, "STG") == count(loop, "LDG") == 4 and count(loop, "MUFU")
    ]
    return min(fitting, key=len)


def count(loop: list[str], what: str) -> int:
    return sum(what in instruction for instruction in loop)


# Four pairs, and what annotated positives take, a third of the loop that few iterations enter. A
# pair has 62 instructions, 7.8 of them special functions, before memory is not the limit (fp32).
BUDGETS = [
    ({}, 320, 16),
    ({"margin": 0.0, "detach_focal": False}, 290, 8),
    ({"kind": 1}, 340, 16),
    ({"margin": 0.0, "gammas": (0.0,) * 4}, 220, 8),
    ({"gammas": (0.5, 3.3, 0.2, 7.5), "detach_focal": False}, 440, 32),
]


@pytest.mark.parametrize("architecture", each(("sm_75", "sm_90", "sm_100")))
@pytest.mark.parametrize("changes, most, special", some_of(BUDGETS, 0, 2))
def test_instructions_of_the_main_loop(changes, most, special, architecture, tmp_path):
    cubin, _ = cuda.compile_program(program("list", **changes), architecture)
    loop = main_loop(cubin, tmp_path)
    assert 100 < len(loop) <= most
    assert count(loop, "MUFU") <= special


def test_the_draw_is_not_contracted(tmp_path, monkeypatch):
    """One fma in the key path would change its bits."""
    source = b"""
    #include "team.h"
    #include "draw.h"
    extern "C" __global__ void keys(const vlal_u32* word, const float* weight, vlal_u32* key) {
      key[threadIdx.x] = vlal_key_bits(word[threadIdx.x], weight[threadIdx.x]);
    }
    """

    def contracted() -> bool:
        cubin, _ = cuda.compile_program(("-DVLAL_TEAM=32",), "sm_90", source=source)
        return any("FFMA" in line for line in disassembled(cubin, tmp_path))

    assert not contracted()
    monkeypatch.setattr(cuda, "_OPTIONS", ("--std=c++17",))
    assert contracted()


def test_nvcc_compiles_the_same_source(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    for defines in (program(), program(kind=1, team=256), cuda.TOTALS):
        command = [nvcc, "-cubin", "-arch=sm_90", "-std=c++17", "--fmad=false", *defines]
        command += [str(SOURCES / "cuda.cu"), "-o", str(tmp_path / "program.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cuda.compiled(program(), "sm_90")
    stamp = first.stat().st_mtime_ns
    assert cuda.compiled(program(), "sm_90") == first
    assert first.stat().st_mtime_ns == stamp
    others = {
        cuda.compiled(program(margin=0.0), "sm_90"),
        cuda.compiled(program(), "sm_80"),
        cuda.compiled(cuda.TOTALS, "sm_90"),
    }
    assert len(others | {first}) == 4


def test_an_unknown_architecture_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="sm_20"):
        cuda.compiled(program(), "sm_20")
    assert not list((tmp_path / "vlal-dist").glob("cuda*"))
