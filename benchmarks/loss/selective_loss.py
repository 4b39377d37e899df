"""The fused selective loss beside the paper's way, eager torch and torch.compile.

    python benchmarks/loss/selective_loss.py [--quick] [--json FILE] [--markdown FILE]

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
    copy           logits copied into memory that is there: what must be read and written at least

On the CPU all ways in turn within a round, the least time of each round, medians over rounds;
ratios within a round. One thread: CPU seconds of the process; more: wall seconds. With a GPU that
is measured too (selective_loss_gpu.py); its figures have `gpu_` before their names.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.loss.selective_loss_gpu import on_gpu  # noqa: E402
from benchmarks.loss.ways import RATIOS, Way, make, ways  # noqa: E402
from vlal_dist.kernels.backend import choose  # noqa: E402

LARGE = 20_000_000
SHAPES = ((64, 591), (1024, 591), (16384, 591), (65536, 620), (4096, 50000))
NAMES = (
    *("paper", "psl", "eager", "compile_draw", "compile_loss"),
    *("ours", "ours_loss", "copy"),
)


def least(way: Way, clock: Callable[[], float], seconds: float) -> float:
    """The least time of as many calls as fit, two at least."""
    best, calls, until = float("inf"), 0, time.perf_counter() + seconds
    while calls < 2 or time.perf_counter() < until:
        started = clock()
        way()
        best, calls = min(best, clock() - started), calls + 1
    return best


def compare(rows: int, attributes: int, threads: int, *, rounds: int) -> dict[str, float]:
    """Milliseconds of every way, and the ratios."""
    torch.set_num_threads(threads)
    data = make(rows, attributes)
    clock = time.process_time if threads == 1 else time.perf_counter
    found = ways(data, paper=rows * attributes < 5e7)
    source, there = data.logits.detach(), torch.empty_like(data.logits)
    found["copy"] = lambda: there.copy_(source)
    for way in found.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, way in found.items():
            taken[name].append(least(way, clock, 0.3))
    result = {f"ms_{name}": 1e3 * statistics.median(times) for name, times in taken.items()}
    for name, (other, mine) in RATIOS.items():
        if other in taken:
            ratios = [a / b for a, b in zip(taken[other], taken[mine], strict=True)]
            result[name] = statistics.median(ratios)
            result[f"{name}_least"], result[f"{name}_most"] = min(ratios), max(ratios)
    result["ns_per_element"] = 1e6 * result["ms_ours"] / (rows * attributes)
    return result


def table(shapes: list[tuple[int, int]], threads: list[int], rounds: int) -> tuple[str, dict]:
    """The CPU's rows as Markdown, and its figures; large shapes take minutes: two rounds."""
    head = [*(f"{name} ms" for name in NAMES), *RATIOS, "ns per element"]
    lines = [f"| shape | threads | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    told: dict[str, float] = {}
    for number in threads:
        for rows, attributes in shapes:
            fewer = min(rounds, 2) if rows * attributes > LARGE else rounds
            found = compare(rows, attributes, number, rounds=fewer)
            suffix = f"{rows}x{attributes}" + (f"_{number}_threads" if number > 1 else "")
            told |= {f"{name}_{suffix}": value for name, value in found.items()}
            cells = [_cell(found, f"ms_{name}") for name in NAMES]
            cells += [_cell(found, name) for name in (*RATIOS, "ns_per_element")]
            lines.append(f"| {rows}x{attributes} | {number} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n", told


def _cell(found: dict[str, float], name: str) -> str:
    if name not in found:
        return ""
    text = f"{found[name]:.3g}"
    if f"{name}_most" in found and found[f"{name}_most"] > found[f"{name}_least"]:
        text += f" ({found[f'{name}_least']:.3g} to {found[f'{name}_most']:.3g})"
    return text


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes, one round")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    print(f"cpu: {choose('cpu')}", file=sys.stderr)
    shapes = list(SHAPES[:2] if arguments.quick else SHAPES)
    text, told = table(shapes, arguments.threads, 1 if arguments.quick else 5)
    if torch.cuda.is_available():
        print(f"cuda: {choose('cuda')}", file=sys.stderr)
        gpu_text, gpu_told = on_gpu(shapes, rounds=3 if arguments.quick else 9)
        text, told = f"{text}\n{gpu_text}", told | gpu_told
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
