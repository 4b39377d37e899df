"""CPU backend of the selective loss: a C++ library, compiled at first use.

g++ (or $CXX) builds it under a file lock; it includes no header of torch or Python, so that it
works with all their versions. Shapes were checked by `operator.selective_loss`, values are here.
"""

import atexit
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels.arguments import OPTIONS, PROBLEMS, SOURCES, Outputs, Tensors, pack, refuse

logger = logging.getLogger(__name__)

# No contraction: the draw's bits are single multiplications and additions. The loss calls fma
# explicitly, so that AVX2 and AVX-512 agree.
FLAGS = (
    OPTIONS,
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "baseline": (),
}
"""Instruction set -> its compiler flags, the widest first."""


def instruction_set() -> str:
    """The widest variant that this processor runs."""
    name = torch.backends.cpu.get_cpu_capability().lower()
    return name if name in VARIANTS else "baseline"


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, which may have arguments, else g++ or clang++.

    Raises:
        ConfigError: there is none.
    """
    wanted = os.environ.get("CXX")
    for command in (shlex.split(wanted),) if wanted else (["g++"], ["clang++"]):
        path = shutil.which(command[0]) if command else None
        if path is not None:
            return [path, *command[1:]]
    if wanted:
        raise ConfigError(f"CXX={wanted} is not a program; give a C++ compiler, or unset it")
    raise ConfigError("no C++ compiler: install g++, or set CXX")


def cache_folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/vlal-dist, else ~/.cache/vlal-dist."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "vlal-dist"


def build(variant: str) -> Path:
    """The library of a variant, compiled unless it is in the cache.

    Args:
        variant: a name of `VARIANTS`.

    Raises:
        ConfigError: no compiler, or it failed, or the cache cannot be written.
    """

    def make(target: Path) -> None:
        program, *rest = compiler()
        command = [program, *rest, *FLAGS, *VARIANTS[variant], str(SOURCES / "cpu.cpp")]
        command += ["-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConfigError(f"{program} cannot be started: {error.strerror}") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise ConfigError(f"{program} failed: {(lines or ['no message'])[0][:300]}")

    return kept(f"cpu-{variant}-{digest_of(FLAGS, VARIANTS[variant])}.so", make)


def digest_of(*settings: object) -> str:
    """Digest of the sources and of everything else that decides what they compile to."""
    digest = hashlib.sha256(repr(settings).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The file of that name in the cache, written unless it is there.

    What is loaded as code must belong to this user or to root, and no one else may write to it or
    to its folder: a folder of another user is not used, such a file is made again. No digest is
    compared: who can write the file can write its digest as well.

    Args:
        name: must differ wherever the content does.
        make: writes the file to the path given.

    Raises:
        ConfigError: the cache cannot be written; and what `make` raises.
    """
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.geteuid() and status.st_mode & 0o022:
            folder.chmod(0o700)  # an older version made it as wide as the umask
        problem = _not_ours(folder.stat(), stat.S_ISDIR)
        if problem is not None:
            _say_unsafe(folder, problem)
            folder = _private_folder()
        target = folder / name
        if not _is_there(target):  # an image may bring it, without a compiler
            _write_once(target, make)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}); set XDG_CACHE_HOME") from None
    return target


def _write_once(target: Path, make: Callable[[Path], None]) -> None:
    """Write the file under its folder's lock: ranks of one node start together."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(target.parent / "lock", flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_there(target):
            return
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as making:
            partial = Path(making) / target.name
            make(partial)
            partial.chmod(0o644)
            partial.replace(target)
    finally:
        os.close(lock)


def _is_there(target: Path) -> bool:
    """Whether the file exists and may be loaded."""
    try:
        status = target.lstat()
    except FileNotFoundError:
        return False
    problem = _not_ours(status, stat.S_ISREG)
    if problem is not None:
        _say_unsafe(target, problem)
    return problem is None


def _not_ours(status: os.stat_result, is_kind: Callable[[int], bool]) -> str | None:
    """Why code is not loaded from what has that status; None: it may be."""
    if not is_kind(status.st_mode):
        return "is a link or a file of another kind"
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    return None


@functools.cache
def _say_unsafe(path: Path, problem: str) -> None:
    logger.warning("%s %s: no code is loaded from it, the kernel is compiled again", path, problem)


@functools.cache
def _private_folder() -> Path:
    """A folder of mode 0700 that ends with the process."""
    folder = tempfile.mkdtemp(prefix="vlal-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


WORTH_A_THREAD = 16_384
"""Elements below which another thread costs more than it saves."""


@functools.cache
def load(variant: str) -> Callable[[Any, Any], int]:
    """The C function of a variant, compiled if need be."""
    function: Any = ctypes.CDLL(str(build(variant))).vlal_selective_loss
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_int64
    return function  # type: ignore[no-any-return]


def run(
    tensors: Tensors,
    mode: str,
    loss: LossConfig,
    *,
    threads: int | None = None,
    variant: str | None = None,
) -> Outputs:
    """Losses, gradient, sums and counts; see `operator.selective_loss`.

    Args:
        tensors: by their names in the C structure; contiguous, `logits` along its rows and no
            float64. `gradient`, which may be the logits, is written and returned if given.
        mode: a name of `MODES`.
        loss: exponents, margin, and how the draw is made.
        threads: most threads used; None: torch's number.
        variant: instruction set; None: the widest of this processor.

    Raises:
        ValueError: values that are not allowed; outputs that were given then hold anything.
    """
    logits = tensors["logits"]
    assert logits is not None
    gradient = tensors.get("gradient")
    if gradient is None:
        gradient = torch.empty(logits.shape, dtype=logits.dtype)
    per_row, sums = torch.empty(len(logits)), torch.empty(5, dtype=torch.float64)
    counts = torch.empty(5, dtype=torch.int64)
    if logits.numel() == 0:  # an empty tensor has no address
        return per_row.zero_(), gradient, sums.zero_(), counts.zero_()
    most = torch.get_num_threads() if threads is None else threads
    arguments = pack(
        {**tensors, "gradient": gradient, "per_row": per_row, "sums": sums, "counts": counts},
        mode,
        loss,
        threads=max(1, min(most, logits.numel() // WORTH_A_THREAD)),
    )
    options = loss.options.values()
    function = load(variant or instruction_set())
    refused = function(arguments, struct.pack(f"{len(options)}f", *options))
    if refused:
        refuse(*divmod(refused, len(PROBLEMS) + 1))
    return per_row, gradient, sums, counts
