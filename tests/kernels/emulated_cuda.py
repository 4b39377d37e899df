"""The CUDA programs on a processor: the same source, each phase in a loop over a team's lanes.

Compiled by g++ for each setting, as NVRTC would; kept beside the CPU's libraries.
"""

import ctypes
import subprocess
from functools import cache
from pathlib import Path

from vlal_dist.kernels import cuda
from vlal_dist.kernels.cpu import SOURCES, compiler, digest_of, kept
from vlal_dist.kernels.cuda import outputs_for, prepare

FOLDER = Path(__file__).with_name("emulation")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Werror")


@cache
def load(defines: tuple[str, ...], extra: tuple[str, ...] = ()):
    """The emulated kernel of a program; its mode is whatever each call asks for."""
    defines = tuple("-DVLAL_MODE=a.mode" if "_MODE=" in one else one for one in defines)
    own = [path.read_bytes() for path in sorted(FOLDER.iterdir())]
    command = [*compiler(), *FLAGS, "-Wno-unknown-pragmas", *extra, *defines]
    command += ["-I", str(FOLDER), "-I", str(SOURCES), str(FOLDER / "emulation.cpp")]

    def make(target):
        subprocess.run([*command, "-o", str(target)], check=True)

    path = kept(f"emulated-{digest_of(FLAGS, extra, defines, own)}.so", make)
    function = ctypes.CDLL(str(path)).emulated
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_char_p
    return function


def run(tensors, mode, loss, largest=0, *, most_shared=232_448):
    """As `cuda.run`, for tensors of the CPU."""
    if tensors["logits"].numel() == 0:
        losses, gradient, sums, counts = outputs_for(tensors["logits"])
        return losses.zero_(), gradient, sums.zero_(), counts.zero_()
    call = prepare(tensors, mode, loss, largest, most_shared=most_shared)
    load(call.defines)(call.arguments, call.launch.blocks)
    failed = load(cuda.TOTALS)(call.arguments, call.launch.blocks)
    if failed is not None:  # on a device the next call of CUDA would fail
        raise ValueError(failed.decode())
    return call.outputs
