"""The fused selective loss beside the paper's way, eager torch and torch.compile.

    python -m benchmarks.loss.selective_loss [--quick] [--json FILE] [--markdown FILE]

Forward and backward of the loss of one batch, fp32, margin 0.05 and detached focal weight (the
authors' setting); feasible sets of 90 to 270 attributes (of 300 to 600 in long rows), k = 30, four
annotated attributes a row. The ways:

    paper          np.random.choice for each row, then the authors' formula in eager torch
    psl            that formula alone, the mask given
    eager          exponential races in eager torch (exponential_, div, topk), then a lean loss
    compile_draw   the same two through torch.compile
    compile_loss   the lean loss alone through torch.compile, the mask given
    ours           the fused operator, draw included
    ours_loss      the fused operator, the drawn attributes given
    in_place       as `ours`, the gradient in the logits' memory, with a copy of the logits first
    copy           logits copied into memory that is there: what must be read and written at least

On the CPU all ways in turn within a round, the least time of each round, medians over rounds;
ratios within a round. One thread: CPU seconds of the process; more: wall seconds. With a GPU that
is measured too (selective_loss_gpu.py); its figures have `gpu_` before their names.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common.harness import Numbers, finish, in_rounds, make_parser, spread, table
from benchmarks.loss.selective_loss_gpu import on_gpu
from benchmarks.loss.ways import RATIOS, Way, make, ours, ways
from vlal_dist.kernels.backend import choose

LARGE = 20_000_000
SHAPES = ((64, 591), (1024, 591), (16384, 591), (65536, 620), (4096, 50000))
NAMES = (
    *("paper", "psl", "eager", "compile_draw", "compile_loss"),
    *("ours", "ours_loss", "in_place", "copy"),
)


def least(way: Way, clock: Callable[[], float], seconds: float) -> float:
    """The least time of as many calls as fit, two at least."""
    best, calls, until = float("inf"), 0, time.perf_counter() + seconds
    while calls < 2 or time.perf_counter() < until:
        started = clock()
        way()
        best, calls = min(best, clock() - started), calls + 1
    return best


def compare(rows: int, attributes: int, threads: int, *, rounds: int) -> tuple[Numbers, list[str]]:
    """Milliseconds of every way and the ratios, and their cells in the table."""
    torch.set_num_threads(threads)
    data = make(rows, attributes)
    clock = time.process_time if threads == 1 else time.perf_counter
    found = ways(data, paper=rows * attributes < 5e7)
    source, there = data.logits.detach(), torch.empty_like(data.logits)
    found["in_place"] = lambda: ours(data, data.draw, there.copy_(source), in_place=True)
    found["copy"] = lambda: there.copy_(source)
    for way in found.values():
        way()
    taken = in_rounds(
        {name: partial(least, way, clock, 0.3) for name, way in found.items()}, rounds
    )
    numbers: Numbers = {f"ms_{name}": 1e3 * statistics.median(t) for name, t in taken.items()}
    cells = [f"{numbers[f'ms_{name}']:.3g}" if name in taken else "" for name in NAMES]
    for name, (other, mine) in RATIOS.items():
        cells.append("")
        if other in taken:
            ratios = [a / b for a, b in zip(taken[other], taken[mine], strict=True)]
            numbers[name] = statistics.median(ratios)
            numbers[f"{name}_least"], numbers[f"{name}_most"] = min(ratios), max(ratios)
            cells[-1] = spread(ratios, ".3g")
    per_element = 1e9 * statistics.median(taken["ours"]) / (rows * attributes)
    return {**numbers, "ns_per_element": per_element}, [*cells, f"{per_element:.3g}"]


def main() -> None:
    """Compare, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    print(f"cpu: {choose('cpu')}", file=sys.stderr)
    shapes = list(SHAPES[:2] if given.quick else SHAPES)
    numbers: Numbers = {}
    lines = []
    for threads in given.threads:
        for rows, attributes in shapes:
            # Large shapes take minutes.
            most = 2 if rows * attributes > LARGE else given.rounds
            found, cells = compare(rows, attributes, threads, rounds=1 if given.quick else most)
            suffix = f"{rows}x{attributes}" + (f"_{threads}_threads" if threads > 1 else "")
            numbers |= {f"{name}_{suffix}": value for name, value in found.items()}
            lines.append([f"{rows}x{attributes}", str(threads), *cells])
    head = ["shape", "threads", *(f"{name} ms" for name in NAMES), *RATIOS, "ns per element"]
    text = table(head, lines)
    if torch.cuda.is_available():
        print(f"cuda: {choose('cuda')}", file=sys.stderr)
        gpu_text, gpu_numbers = on_gpu(shapes, rounds=3 if given.quick else 9)
        text, numbers = f"{text}\n{gpu_text}", numbers | gpu_numbers
    finish(given, text, numbers)


if __name__ == "__main__":
    main()
