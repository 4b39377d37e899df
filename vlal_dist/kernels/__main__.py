"""Report and self-test of the backend that computes the selective loss on this machine.

python -m vlal_dist.kernels          report and self-test
python -m vlal_dist.kernels build    compile into the cache, for an image without a compiler
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cuda
from vlal_dist.kernels.arguments import KINDS
from vlal_dist.kernels.backend import VARIABLE, choose
from vlal_dist.kernels.cpu import VARIANTS, build, cache_folder, compiler
from vlal_dist.kernels.self_test import self_test

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
ROWS = {
    "selective": ("draw", "list"),
    "asl_ignoring": ("ignore", "negatify", "mask"),
    "ce_ignoring": ("ignore", "negatify", "mask"),
}
"""Rows of Table 1 with different exponents, and the forms of ignored pairs they occur with."""


def main() -> int:
    """Report or build; exit code 1 if a backend is wrong, 64 if a request cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m vlal_dist.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command")
    building = commands.add_parser("build", help="compile into the cache")
    building.add_argument(
        "--architecture",
        nargs="*",
        default=(),
        metavar="SM",
        help=f"GPUs to compile for, such as {' '.join(ARCHITECTURES)}; none: only the CPU",
    )
    arguments = parser.parse_args()
    try:
        return _build(arguments.architecture) if arguments.command else _report()
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 64


def _report() -> int:
    _say("device", "backend", "why")
    forced = os.environ.get(VARIABLE, "")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if forced in ("cpu", "cuda"):
        devices = [forced]
    for device in devices:
        _say(device, *choose(device))
    if not torch.cuda.is_available():
        _say("cuda", "none", "torch sees no GPU")
    for name, ask in (("compiler", _compiler), ("nvrtc", cuda.version)):
        try:
            _say(name, ask(), "")
        except ConfigError as error:
            _say(name, "none", str(error))
    _say("cache", str(cache_folder()), "")
    good = True
    for device in devices:
        found = self_test(torch.device(device))
        good = good and found.good
        draw = "same draw" if found.same_draw else "ANOTHER DRAW"
        text = f"{draw}, loss within {found.loss:.1e}, gradient within {found.gradient:.1e}"
        _say(f"self-test {device}", "right" if found.good else "WRONG", text)
    if not good:
        sys.stderr.write(f"error: a backend is wrong; set {VARIABLE}=reference and report it\n")
    return 0 if good else 1


def _compiler() -> str:
    return " ".join(compiler())


def _build(architectures: list[str]) -> int:
    made: list[Path] = [build(variant) for variant in VARIANTS]
    for architecture in architectures:
        made.append(cuda.compiled(cuda.TOTALS, architecture))
        made += [cuda.compiled(defines, architecture) for defines in _common()]
    for path in made:
        sys.stdout.write(f"{path}\n")
    return 0


def _common() -> list[tuple[str, ...]]:
    """Programs of the rows of Table 1 with default settings; others are compiled at first use."""
    return [
        cuda.program(kind, mode, LossConfig.model_validate({"loss": row}), cuda.WARP)
        for kind in KINDS.values()
        for row, modes in ROWS.items()
        for mode in modes
    ]


def _say(name: str, what: str, why: str) -> None:
    sys.stdout.write(f"{name:16}{what:12}{why}".rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
