"""Our CLIP scoring on Ray beside its ceiling, the authors' way, Ray Data and clip-retrieval.

    make clip-retrieval                           # once: that peer, in .clip-retrieval
    python benchmarks/scoring/score.py [--quick] [--json FILE] [--markdown FILE] [--folder FOLDER]

ViT-B/32 with random weights, fp32, batches of 32, crops of 250x187 in real packed shards; one torch
and one decoding thread per process, one process per core. Each measurement is a process of its own,
one after the other, their order reversed from round to round; ratios within a round, medians over
rounds. What each clock includes is said in score_run.py and in peers/score_*.py.

The encoder takes nearly all of the time, so actors and processes are measured again with a small
model (`_small`), twenty times as fast, where overhead shows.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.scoring.table import Figures, write  # noqa: E402

PEER_PYTHON = ROOT / ".clip-retrieval/bin/python"
MODEL, BATCH = "ViT-B-32", 32
LONGEST_S = 900


@dataclass(frozen=True)
class Entry:
    """One thing to measure.

    Attributes:
        label: key of the results.
        command: prints the figures as JSON in its last line.
        once: in the first round only.
    """

    label: str
    command: list[str]
    once: bool = False


def entries(folder: Path, *, quick: bool, absent: str | None) -> list[Entry]:
    """What is measured, in order."""
    vit, small = ("vit-quick", "small-quick") if quick else ("vit", "small")

    def ours(label: str, what: str, case: str, *more: str, once: bool = False) -> Entry:
        command = [sys.executable, str(ROOT / "benchmarks/scoring/run.py"), what, str(folder)]
        return Entry(label, [*command, "--case", case, *more], once)

    def ray_data(shape: str) -> Entry:
        command = [sys.executable, str(ROOT / "benchmarks/peers/score_ray_data.py"), str(folder)]
        return Entry(f"ray_data_{shape}", [*command, "--case", vit, "--shape", shape])

    found = []
    for case, suffix in ((vit, ""), (small, "_small")):
        for name, what in (("actor", "actors"), ("process", "processes")):
            found.append(ours(f"{name}{suffix}", what, case, "--number", "1"))
            found.append(ours(f"two_{what}{suffix}", what, case, "--number", "2"))
    found.append(ours("encoder", "encoder", vit))
    found += [ray_data("actors"), ray_data("tasks")]
    if absent is None:
        found.append(Entry("clip_retrieval", clip_retrieval(folder, vit)))
    found.append(ours("naive", "naive", vit, "--seconds", "1" if quick else "20"))
    found.append(ours("rescore", "rescore", vit))
    return found + ([] if quick else [ours("program", "program", vit, once=True)])


def clip_retrieval(folder: Path, case: str) -> list[str]:
    """The command that measures clip-retrieval."""
    command = [str(PEER_PYTHON), str(ROOT / "benchmarks/peers/score_clip_retrieval.py")]
    command += [str(folder / case / "dataset/train/shards"), "--model", MODEL]
    weights = folder / "models" / f"{MODEL}.safetensors"
    return [*command, "--weights", str(weights), "--batch", str(BATCH)]


def why_absent() -> str | None:
    """Why clip-retrieval cannot be measured; None: it can."""
    if not PEER_PYTHON.exists():
        return "no .clip-retrieval environment: run make clip-retrieval"
    done = subprocess.run(
        [str(PEER_PYTHON), "-c", "from clip_retrieval import clip_inference"],
        check=False,
        capture_output=True,
        text=True,
    )
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def run(command: Sequence[str]) -> str:
    """The last line that a measurement prints; nothing is downloaded."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, check=False, env=env, capture_output=True, text=True, timeout=LONGEST_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:].strip()}")
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""


def measure(command: Sequence[str]) -> Figures:
    """Figures of one measurement."""
    last = run(command)
    # clip-retrieval's progress stands before it on the same line.
    return Figures(**json.loads(last[last.index("{") :]))


def one_round(planned: Sequence[Entry], results: dict[str, list[Figures]]) -> str | None:
    """Measure everything once; why clip-retrieval failed, if it did: its results are dropped."""
    failed = None
    for entry in planned:
        try:
            found = measure(entry.command)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if entry.label != "clip_retrieval":
                raise
            failed = str(error).splitlines()[-1]
            results[entry.label] = []
            continue
        results[entry.label].append(found)
        print(f"{entry.label} {found.per_s:,.2f}/s", file=sys.stderr)
    return failed


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bench-score")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    folder, rounds = arguments.folder.resolve(), 1 if arguments.quick else arguments.rounds
    cases = ["vit-quick", "small-quick"] if arguments.quick else ["vit", "small"]
    run([sys.executable, str(ROOT / "benchmarks/scoring/data.py"), str(folder), *cases])
    absent = why_absent()
    if absent:
        print(f"clip-retrieval is absent: {absent}", file=sys.stderr)
    planned = entries(folder, quick=arguments.quick, absent=absent)
    results: dict[str, list[Figures]] = {entry.label: [] for entry in planned}
    text = ""
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        failed = one_round(planned if number % 2 == 0 else planned[::-1], results)
        absent = absent or failed
        planned = [
            entry
            for entry in planned
            if not entry.once and (absent is None or entry.label != "clip_retrieval")
        ]
        text = write(
            results, absent=absent, json_path=arguments.json, markdown_path=arguments.markdown
        )
    print(text)


if __name__ == "__main__":
    main()
