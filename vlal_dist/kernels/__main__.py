"""Report and self-test of the backend that computes the selective loss on this machine.

python -m vlal_dist.kernels          report and self-test
python -m vlal_dist.kernels build    compile into the cache, for an image without a compiler
"""

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

import torch

from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cuda
from vlal_dist.kernels.arguments import KINDS, Draw, FeasibleTable
from vlal_dist.kernels.backend import VARIABLE, choose
from vlal_dist.kernels.cpu import VARIANTS, build, cache_folder, compiler
from vlal_dist.kernels.operator import Kernel, selective_loss

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
TABLE1_FORMS = {
    "selective": ("draw", "list"),
    "asl_ignoring": ("ignore", "negatify", "mask"),
    "ce_ignoring": ("ignore", "negatify", "mask"),
}
"""Rows of Table 1 with different exponents, and the forms of ignored pairs they occur with."""
ROWS, ATTRIBUTES, OBJECTS = 64, 591, 5
LIMIT = 1e-5
"""Relative error in float32 that every backend may have."""


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
        right, text = self_test(torch.device(device))
        good = good and right
        _say(f"self-test {device}", "right" if right else "WRONG", text)
    if not good:
        sys.stderr.write(f"error: a backend is wrong; set {VARIABLE}=reference and report it\n")
    return 0 if good else 1


def self_test(device: torch.device) -> tuple[bool, str]:
    """Compare the backend that `choose` takes with the reference, on a made-up batch.

    Returns:
        Whether it draws the same and errs by at most `LIMIT`; how far it is from the reference: the
        greatest relative difference of a row's loss, and of the gradient the norm of the difference
        relative to its own.

    Raises:
        ConfigError: the forced backend does not work here.
    """
    generator = torch.Generator().manual_seed(0)
    member = torch.rand(OBJECTS, ATTRIBUTES, generator=generator) < 0.3
    object_id = torch.randint(OBJECTS, (ROWS,), generator=generator)
    sizes = member.sum(1)
    lengths = sizes[object_id]
    label = torch.randint(-1, 2, (ROWS, ATTRIBUTES), generator=generator).to(torch.int8)
    label[torch.rand(ROWS, ATTRIBUTES, generator=generator) > 0.01] = 0
    logits = 3 * torch.randn(ROWS, ATTRIBUTES, generator=generator) - 2
    weight = torch.rand(int(lengths.sum()), generator=generator).mul(12).exp()
    zero = torch.zeros(1, dtype=torch.int64)
    sets = FeasibleTable(
        torch.cat([zero, sizes.cumsum(0)]), member.nonzero()[:, 1].to(torch.int32), int(sizes.max())
    )
    draw = Draw(
        weight_indptr=torch.cat([zero, lengths.cumsum(0)]).to(device),
        inverse_weight=weight.to(device),
        uid=torch.arange(ROWS, device=device),
        visit=torch.zeros(ROWS, dtype=torch.int64, device=device),
        seed=torch.tensor([7], device=device),
    )
    found = []
    for kernel in get_args(Kernel):
        leaf = logits.to(device).requires_grad_()
        terms = selective_loss(
            leaf,
            label=label.to(device),
            object_id=object_id.to(device),
            feasible=FeasibleTable(sets.indptr.to(device), sets.indices.to(device), sets.largest),
            ignored=draw,
            loss=LossConfig(),
            kernel=kernel,
        )
        (gradient,) = torch.autograd.grad(terms.per_row.sum(), leaf)
        found.append((terms.per_row.detach(), gradient))
    (loss, gradient), (exact_loss, exact) = found
    same_draw = torch.equal(gradient == 0, exact == 0)
    loss_error = float(((loss - exact_loss) / exact_loss).abs().max())
    error = float((gradient - exact).norm() / exact.norm())
    drawn = "same draw" if same_draw else "ANOTHER DRAW"
    text = f"{drawn}, loss within {loss_error:.1e}, gradient within {error:.1e}"
    return same_draw and loss_error <= LIMIT and error <= LIMIT, text


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
        for row, modes in TABLE1_FORMS.items()
        for mode in modes
    ]


def _say(name: str, what: str, why: str) -> None:
    sys.stdout.write(f"{name:16}{what:12}{why}".rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
