"""The GPU's part of `benchmarks/loss/selective_loss.py`.

Every way forward and backward by CUDA events, as a user calls it; and what our programs alone take,
replayed from a CUDA graph over batches that together exceed the second-level cache three times
(`graph`: the draw included; `graph_list`: the drawn attributes given). `fraction_of_copy` is the
time of copying the logits over that of `graph_list`, both replayed the same way.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.harness import Numbers, table
from benchmarks.loss.ways import RATIOS, Data, Way, make, ours, ways

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_BUFFERS = 16


def event_ms(way: Way, calls: int) -> float:
    """Milliseconds of a call, the mean of some in a row."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        way()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / calls


def replayed_ms(call: Callable[[Tensor], object], buffers: list[Tensor], rounds: int) -> float:
    """Milliseconds of a call on one buffer, all buffers in turn in one graph."""
    for buffer in buffers[:2]:
        call(buffer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for buffer in buffers:
            call(buffer)
    graph.replay()
    times = [event_ms(graph.replay, 5) / len(buffers) for _ in range(rounds)]
    return statistics.median(times)


def buffers_of(data: Data) -> list[Tensor]:
    """Copies of the logits, three times the second-level cache in all."""
    logits = data.logits.detach()
    cache = torch.cuda.get_device_properties(logits.device).L2_cache_size
    number = -(-3 * cache // (logits.numel() * logits.element_size()))
    return [logits.clone() for _ in range(max(2, min(number, MOST_BUFFERS)))]


def compare(rows: int, attributes: int, dtype: torch.dtype, *, rounds: int) -> dict[str, float]:
    """Milliseconds of every way, ratios, and what our programs alone take."""
    data = make(rows, attributes).to("cuda", dtype)
    found = ways(data, paper=rows * attributes < 5e7)
    taken: dict[str, list[float]] = {}
    for name, way in found.items():
        way()
        once = event_ms(way, 2)
        calls = max(1, min(50, int(100 / max(once, 0.01))))
        taken[name] = [event_ms(way, calls) for _ in range(1 if name == "paper" else rounds)]
    result = {f"ms_{name}": statistics.median(times) for name, times in taken.items()}
    for name, (other, mine) in RATIOS.items():
        if other in taken:
            result[name] = result[f"ms_{other}"] / result[f"ms_{mine}"]
    buffers, there = buffers_of(data), torch.empty_like(data.logits)
    with torch.no_grad():
        for name, ignored in (("graph", data.draw), ("graph_list", data.drawn)):
            call = lambda z, given=ignored: ours(data, given, z)  # noqa: E731
            result[f"us_{name}"] = 1e3 * replayed_ms(call, buffers, rounds)
        result["us_copy"] = 1e3 * replayed_ms(there.copy_, buffers, rounds)
    result["fraction_of_copy"] = result["us_copy"] / result["us_graph_list"]
    result["fraction_of_copy_with_draw"] = result["us_copy"] / result["us_graph"]
    result["ns_per_element"] = 1e6 * result["ms_ours"] / (rows * attributes)
    return result


def on_gpu(shapes: list[tuple[int, int]], *, rounds: int) -> tuple[str, Numbers]:
    """The GPU's table, and its figures."""
    numbers: Numbers = {}
    columns: list[str] = []
    lines = []
    for rows, attributes in shapes:
        for kind, dtype in TYPES.items():
            found = compare(rows, attributes, dtype, rounds=rounds)
            columns = columns or list(found)
            suffix = f"{rows}x{attributes}" + ("" if kind == "fp32" else f"_{kind}")
            for name, value in found.items():
                numbers[f"{'' if name == 'fraction_of_copy' else 'gpu_'}{name}_{suffix}"] = value
            cells = [f"{found[name]:.3g}" if name in found else "" for name in columns]
            lines.append([f"{rows}x{attributes}", kind, *cells])
            torch.cuda.empty_cache()
    text = table(["shape", "type", *columns], lines)
    return f"{torch.cuda.get_device_name()}\n\n{text}", numbers
