"""Our CLIP scoring on Ray beside its ceiling, the authors' way, Ray Data and clip-retrieval.

    make clip-retrieval                           # once: that peer, in .clip-retrieval
    python -m benchmarks.scoring.score [--quick] [--json FILE] [--markdown FILE] [--folder FOLDER]

ViT-B/32 with random weights, fp32, batches of 32, crops of 250x187 in real packed shards; one torch
and one decoding thread per process, one process per core. Each measurement is a process of its own,
one after the other, their order reversed from round to round; ratios within a round, medians over
rounds. The heads of run.py and of peers/score_*.py say what each clock includes.

The encoder takes nearly all of the time, so actors and processes are measured again with a small
model (`_small`), twenty times as fast, where overhead shows.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.harness import (
    ROOT,
    Numbers,
    finish,
    in_rounds,
    make_parser,
    options,
    ratios,
    run_together,
    spread,
    table,
    why_absent,
)
from benchmarks.scoring.data import CASES, prepare, weights_path

PEER_PYTHON = ROOT / ".clip-retrieval/bin/python"
RATIOS: dict[str, tuple[str, tuple[str, ...], float | None]] = {
    "actor_to_ceiling": ("actor", ("process",), 0.95),
    "two_actors_to_one": ("two_actors", ("actor",), 1.8),
    "two_actors_to_ceiling": ("two_actors", ("two_processes",), None),
    "two_processes_to_one": ("two_processes", ("process",), None),
    "encoder_share": ("actor", ("encoder",), None),
    "ratio_to_naive": ("actor", ("naive",), 20.0),
    "ratio_to_ray_data": ("two_actors", ("ray_data_actors", "ray_data_tasks"), 1.0),
    "ratio_to_clip_retrieval": ("two_actors", ("clip_retrieval",), None),
    "actor_to_ceiling_small": ("actor_small", ("process_small",), None),
    "two_actors_to_one_small": ("two_actors_small", ("actor_small",), None),
    "two_actors_to_ceiling_small": ("two_actors_small", ("two_processes_small",), None),
    "two_processes_to_one_small": ("two_processes_small", ("process_small",), None),
}
"""Name -> ours, the others (of several the faster in each round), the target if there is one."""


def commands(folder: Path, *, quick: bool, with_peer: bool) -> dict[str, list[str]]:
    """What is measured: label -> command."""
    vit, small = ("vit-quick", "small-quick") if quick else ("vit", "small")

    def ours(what: str, case: str, **more: object) -> list[str]:
        run = [sys.executable, "-m", "benchmarks.scoring.run", what, str(folder)]
        return [*run, *options({"case": case, **more})]

    found = {}
    for case, suffix in ((vit, ""), (small, "_small")):
        for name, what in (("actor", "actors"), ("process", "processes")):
            found[f"{name}{suffix}"] = ours(what, case, number=1)
            found[f"two_{what}{suffix}"] = ours(what, case, number=2)
    found["encoder"] = ours("encoder", vit)
    for shape in ("actors", "tasks"):
        peer = [sys.executable, "-m", "benchmarks.peers.score_ray_data", str(folder)]
        found[f"ray_data_{shape}"] = [*peer, "--case", vit, "--shape", shape]
    if with_peer:
        peer = [str(PEER_PYTHON), "-m", "benchmarks.peers.score_clip_retrieval"]
        one = CASES[vit]
        given = {"model": one.model, "weights": weights_path(folder, one), "batch": one.batch}
        found["clip_retrieval"] = [
            *peer, str(folder / vit / "dataset/train/shards"), *options(given)
        ]  # fmt: skip
    found["naive"] = ours("naive", vit, seconds=1 if quick else 20)
    return found


def summarise(rates: Mapping[str, Sequence[float]]) -> tuple[str, Numbers]:
    """Tables and flat numbers: medians over rounds of rates, and of ratios within a round."""
    numbers: Numbers = {}
    rows = []
    for name, (ours, others, target) in RATIOS.items():
        wanted, found = "" if target is None else f">= {target:g}", []
        if all(other in rates for other in others):
            found = ratios(rates[ours], *(rates[other] for other in others))
        numbers[name] = statistics.median(found) if found else None
        rows.append((name, spread(found, ".3f") if found else "null", wanted))
    numbers |= {f"per_s_{label}": statistics.median(found) for label, found in rates.items()}
    text = table(
        ["what", "images per second, median"],
        [(label, spread(found)) for label, found in rates.items()],
    )
    return f"{text}\n{table(['ratio', 'median over rounds', 'target'], rows)}", numbers


def main() -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bench-score")
    given = parser.parse_args()
    folder = given.folder.resolve()
    for name in ("vit-quick", "small-quick") if given.quick else ("vit", "small"):
        prepare(folder, CASES[name])
    absent = why_absent(PEER_PYTHON, "clip_retrieval.clip_inference")
    if absent:
        print(f"clip-retrieval is absent: {absent}; see make clip-retrieval", file=sys.stderr)

    def rate(command: list[str]) -> float:
        (found,) = run_together([command])
        return float(found["count"] / found["seconds"])

    planned = commands(folder, quick=given.quick, with_peer=absent is None)
    calls = {label: partial(rate, command) for label, command in planned.items()}
    finish(given, *summarise(in_rounds(calls, 1 if given.quick else given.rounds)))


if __name__ == "__main__":
    main()
