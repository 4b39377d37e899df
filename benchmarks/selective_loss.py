"""The fused selective loss beside the paper's way, eager torch and torch.compile, on the CPU.

    python benchmarks/selective_loss.py [--quick] [--json FILE] [--markdown FILE] [--threads 1 2]

Forward and backward of the loss of one batch, fp32, margin 0.05 and detached focal weight (the
authors' setting); feasible sets of 90 to 270 attributes (of 300 to 600 in long rows), k = 30, four
annotated attributes a row. The ways:

    paper          np.random.choice for each row, then the authors' formula in eager torch
    eager          exponential races in eager torch (exponential_, div, topk), then a lean loss
    compile_draw   the same two through torch.compile
    compile_loss   the lean loss alone through torch.compile, the mask given
    ours           the fused operator, draw included
    ours_loss      the fused operator, the drawn attributes given

All ways in turn within a round, the least time of each round, medians over rounds; ratios within a
round. One thread: CPU seconds of the process; more: wall seconds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlal_dist.kernels.backend import choose  # noqa: E402
from vlal_dist.kernels.inputs import Draw, FeasibleTable  # noqa: E402
from vlal_dist.kernels.selective_loss import selective_loss  # noqa: E402

SHAPES = ((64, 591), (1024, 591), (16384, 591), (65536, 620), (4096, 50000))
OBJECTS, K, GAMMAS, MARGIN = 50, 30, (1.0, 2.0, 4.0, 7.0), 0.05
Way = Callable[[], None]


@dataclass
class Data:
    """One batch, in the forms that the ways take; B rows, A attributes."""

    logits: Tensor
    label: Tensor
    object_id: Tensor
    table: FeasibleTable
    draw: Draw
    feasible: Tensor
    weight: Tensor
    mask: Tensor
    drawn: Tensor


def make(rows: int, attributes: int) -> Data:
    """A made-up batch from a seed."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(*((90, 271) if attributes < 10_000 else (300, 601)), OBJECTS)
    lists = [np.sort(rng.choice(attributes, size, replace=False)) for size in sizes]
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    object_id = rng.integers(0, OBJECTS, rows)
    row_indptr = np.concatenate([[0], np.cumsum(sizes[object_id])])
    inverse = np.exp(rng.exponential(2.0, row_indptr[-1])).astype(np.float32)
    row = np.repeat(np.arange(rows), sizes[object_id])
    column = np.concatenate([lists[one] for one in object_id])
    feasible = torch.zeros(rows, attributes, dtype=torch.bool)
    weight = torch.zeros(rows, attributes)
    feasible[row, column] = True
    weight[row, column] = torch.from_numpy(1 / inverse)
    label = torch.zeros(rows, attributes, dtype=torch.int8)
    places = torch.from_numpy(rng.integers(0, attributes, (rows, 4)))
    label.scatter_(1, places, torch.tensor([[1, 1, -1, -1]], dtype=torch.int8).expand(rows, 4))
    draw = Draw(
        torch.from_numpy(row_indptr.astype(np.int64)),
        torch.from_numpy(inverse),
        K,
        False,
        torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, rows)),
        torch.zeros(rows, dtype=torch.int64),
        torch.tensor([1]),
    )
    table = FeasibleTable(
        torch.from_numpy(indptr.astype(np.int64)),
        torch.from_numpy(np.concatenate(lists).astype(np.int32)),
    )
    logits = (torch.randn(rows, attributes) * 3 - 2).requires_grad_()
    data = Data(
        logits, label, torch.from_numpy(object_id), table, draw, feasible, weight, label == 2, places
    )
    data.mask = races(data.weight)
    data.drawn = data.mask.nonzero()[:, 1].view(rows, K).to(torch.int32)
    return data


def races(weight: Tensor) -> Tensor:
    """Exponential races in torch; a weight of 0 is never drawn."""
    key = torch.empty_like(weight).exponential_() / weight
    smallest = key.topk(K, dim=1, largest=False).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, smallest, True)


def choices(data: Data) -> Tensor:
    """The paper's Fig. 3 to the letter: one call of numpy for each row."""
    mask = np.zeros(data.weight.shape, dtype=bool)
    weight, feasible = data.weight.numpy().astype(np.float64), data.feasible.numpy()
    for row in range(len(mask)):
        members = np.flatnonzero(feasible[row])
        chance = weight[row, members]
        mask[row, np.random.choice(members, K, replace=False, p=chance / chance.sum())] = True
    return torch.from_numpy(mask)


def authors_loss(z: Tensor, label: Tensor, feasible: Tensor, ignored: Tensor) -> Tensor:
    """Shaped as the authors' and ASL's code: sigmoid, clip, clamp, one focal weight."""
    positive, negative, unknown = label == 1, label == -1, label == 0
    p = torch.sigmoid(z)
    q = (1 - p + MARGIN).clamp(max=1)
    entropy = positive * torch.log(p.clamp(min=1e-8)) + ~positive * torch.log(q.clamp(min=1e-8))
    with torch.no_grad():
        weight = (
            torch.pow(1 - p, GAMMAS[0]) * positive
            + torch.pow(1 - q, GAMMAS[1]) * negative
            + torch.pow(1 - q, GAMMAS[2]) * (unknown & feasible & ~ignored)
            + torch.pow(1 - q, GAMMAS[3]) * (unknown & ~feasible)
        )
    return -(weight * entropy).sum()


def lean_loss(z: Tensor, label: Tensor, feasible: Tensor, ignored: Tensor) -> Tensor:
    """As few operations as torch needs."""
    gamma = torch.where(feasible, GAMMAS[2], GAMMAS[3])
    gamma = torch.where(label < 0, GAMMAS[1], gamma)
    positive = label > 0
    p_m = (torch.sigmoid(z) - MARGIN).clamp(min=0)
    entropy = torch.where(positive, F.softplus(-z), -torch.log1p(-p_m))
    with torch.no_grad():
        weight = torch.where(positive, torch.sigmoid(-z), p_m**gamma)
    return torch.where(ignored & (label == 0), 0.0, weight * entropy).sum()


def ways(data: Data, *, paper: bool) -> dict[str, Way]:
    """What is measured, by name; the paper's draw takes a minute at the largest shapes."""

    def drawn(z: Tensor, label: Tensor, feasible: Tensor, weight: Tensor) -> Tensor:
        return lean_loss(z, label, feasible, races(weight))

    compiled_draw, compiled_loss = torch.compile(drawn), torch.compile(lean_loss)

    def backward(loss: Callable[[], Tensor]) -> Way:
        def run() -> None:
            data.logits.grad = None
            loss().backward()  # type: ignore[no-untyped-call]

        return run

    def ours(ignored: Draw | Tensor) -> Tensor:
        return selective_loss(
            data.logits,
            label=data.label,
            object_id=data.object_id,
            feasible=data.table,
            ignored=ignored,
            gammas=GAMMAS,
            margin=MARGIN,
            detach_focal=True,
        ).per_row.sum()

    z, label, feasible, weight = data.logits, data.label, data.feasible, data.weight
    found = {
        "paper": backward(lambda: authors_loss(z, label, feasible, choices(data))),
        "eager": backward(lambda: lean_loss(z, label, feasible, races(weight))),
        "compile_draw": backward(lambda: compiled_draw(z, label, feasible, weight)),
        "compile_loss": backward(lambda: compiled_loss(z, label, feasible, data.mask)),
        "ours": backward(lambda: ours(data.draw)),
        "ours_loss": backward(lambda: ours(data.drawn)),
    }
    if not paper:
        del found["paper"]
    return found


def least(way: Way, clock: Callable[[], float], seconds: float) -> float:
    """The least time of as many calls as fit, two at least."""
    best, calls, until = float("inf"), 0, time.perf_counter() + seconds
    while calls < 2 or time.perf_counter() < until:
        started = clock()
        way()
        best, calls = min(best, clock() - started), calls + 1
    return best


RATIOS = {
    "vs_paper_way": ("paper", "ours", 20.0),
    "vs_eager": ("eager", "ours", None),
    "vs_compile_draw": ("compile_draw", "ours", 7.0),
    "vs_compile_loss": ("compile_loss", "ours_loss", 5.0),
}


def compare(rows: int, attributes: int, threads: int, *, rounds: int) -> dict[str, float]:
    """Milliseconds of every way, and the ratios."""
    torch.set_num_threads(threads)
    data = make(rows, attributes)
    clock = time.process_time if threads == 1 else time.perf_counter
    found = ways(data, paper=rows * attributes < 5e7)
    for way in found.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, way in found.items():
            taken[name].append(least(way, clock, 0.3))
    result = {f"ms_{name}": 1e3 * statistics.median(times) for name, times in taken.items()}
    for name, (other, mine, _) in RATIOS.items():
        if other in taken:
            pairs = zip(taken[other], taken[mine], strict=True)
            result[name] = statistics.median(a / b for a, b in pairs)
    result["ns_per_element"] = 1e6 * result["ms_ours"] / (rows * attributes)
    return result


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes, one round")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    print(f"backend: {choose('cpu')}", file=sys.stderr)
    told: dict[str, float] = {}
    names = ("paper", "eager", "compile_draw", "compile_loss", "ours", "ours_loss")
    head = [*(f"{name} ms" for name in names), *RATIOS, "ns per element"]
    lines = [f"| shape | threads | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for threads in arguments.threads:
        for rows, attributes in SHAPES[:2] if arguments.quick else SHAPES:
            found = compare(rows, attributes, threads, rounds=1 if arguments.quick else 5)
            suffix = f"{rows}x{attributes}" + (f"_{threads}_threads" if threads > 1 else "")
            told |= {f"{name}_{suffix}": value for name, value in found.items()}
            cells = [found.get(f"ms_{name}") for name in names]
            cells += [found.get(name) for name in (*RATIOS, "ns_per_element")]
            texts = ["" if cell is None else f"{cell:.3g}" for cell in cells]
            lines.append(f"| {rows}x{attributes} | {threads} | {' | '.join(texts)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
