"""What metrics cost a training: their calls, and scrapers that ask a thousand times a second.

    FASHION12K=FOLDER python benchmarks/metrics/cost.py [--cycles 20] [--markdown FILE]

Trains on real photos (configs/fashion12k.yaml, draws without CLIP; packed if absent) with the real
trainer in a process of its own, which notes when each step ended, and the CPU seconds of its thread
inside the calls of `TrainMetrics`. Meanwhile phases of some seconds alternate:

* none: nobody asks;
* decoy: a thousand connections a second, to an endpoint of a process that does nothing else;
* asked: the same, to the training.

Asked beside none is what a scraper costs that runs on the training's own cores; asked beside decoy
what is left of that if it runs elsewhere. The same once more with prometheus_client's own HTTP
server in the place of our endpoint. Step times of a shared machine vary more than a good endpoint
costs: the CPU seconds of its threads are the finer figure.
"""

import argparse
import datetime
import json
import os
import socketserver
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.metrics.scrapers_load import PATIENCE_S, Theirs, helpers  # noqa: E402

CONFIG = ["--config", "configs/fashion12k.yaml"]
TRAIN = [
    "--data.likelihood", "scores", "--method.draw_weights", "uniform", "--training.epochs", "1000",
    "--training.schedule", "constant", "--training.lr_new", "1e-4",
    "--training.checkpoint_epochs", "1000",
]  # fmt: skip
PHASE_S, SETTLE_S = 2.0, 0.5
PHASES = ("none", "decoy", "asked")
PAIRS = (("asked", "none"), ("decoy", "none"), ("asked", "decoy"))
SERVERS = ("ours", "prometheus_client")
CALLS = ("step", "times", "interval", "loader", "validation", "state", "saved", "resumed")


def train(file: Path, *, server: str, arguments: list[str]) -> None:
    """Train in this process; a line per step, and one with where it serves."""
    from vlal_dist import train as program
    from vlal_dist.observability import metrics
    from vlal_dist.observability.metrics import TrainMetrics
    from vlal_dist.program import run_program

    lines, spent, served = file.open("w", buffering=1), [0.0], [0.0, 0]
    if server == "prometheus_client":
        metrics.Endpoint = Theirs  # type: ignore[assignment,misc]

    def clocked(work: Any) -> Any:
        def call(*given: Any) -> None:
            before = time.thread_time()
            work(*given)
            served[0] += time.thread_time() - before
            served[1] += work.__name__ == "process_request_thread"

        return call

    for name in ("process_request", "process_request_thread"):
        work = getattr(socketserver.ThreadingMixIn, name)
        setattr(socketserver.ThreadingMixIn, name, clocked(work))

    def timed(work: Any, *, step: bool) -> Any:
        def call(self: Any, *given: Any, **named: Any) -> Any:
            before = time.thread_time()
            done = work(self, *given, **named)
            spent[0] += time.thread_time() - before
            if step:
                line = {"at": time.monotonic(), "s": named["duration_s"], "cpu_s": spent[0]}
                line["served_s"], line["handled"] = served
                lines.write(json.dumps(line) + "\n")
                spent[0] = 0.0
            return done

        return call

    for name in CALLS:
        setattr(TrainMetrics, name, timed(getattr(TrainMetrics, name), step=name == "step"))
    serve = TrainMetrics.serve

    def told(self: Any, **named: Any) -> Any:
        port = serve(self, **named)
        lines.write(json.dumps({"port": port}) + "\n")
        return port

    TrainMetrics.serve = told  # type: ignore[method-assign]
    run_program(program.PROGRAM, [*CONFIG, *TRAIN, *arguments])


def lines_of(file: Path) -> list[dict[str, float]]:
    """What the training wrote so far, whole lines only."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def measure(server: str, *, cycles: int, folder: Path) -> dict[str, Any]:
    """Phases of one training: their step times and scrapes."""
    file, run = folder / f"{server}.jsonl", folder / f"run-{server}"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--train", str(file), "--server", server]
    command += ["--paths.run", str(run), "--observability.metrics_port", "29400"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log = (folder / f"{server}.log").open("w")
    process = subprocess.Popen(
        [*command, "--resume", "none"], cwd=ROOT, env=environment, stdout=log, stderr=log
    )
    spans: list[dict[str, Any]] = []
    try:
        with helpers(server) as (decoy_port, port, counts):
            while len(lines_of(file)) < 20:
                assert process.poll() is None, f"the training ended: {log.name}"
                time.sleep(0.2)
            ports = {"none": 0, "decoy": decoy_port, "asked": int(lines_of(file)[0]["port"])}
            for cycle in range(cycles):
                # The order turns, so that what a phase leaves behind meets each of the others.
                for place in range(len(PHASES)):
                    phase = PHASES[(cycle + place) % len(PHASES)]
                    port.value = ports[phase]
                    time.sleep(SETTLE_S)
                    before, begin = list(counts), time.monotonic()
                    time.sleep(PHASE_S)
                    asked, answered = (b - a for a, b in zip(before, counts, strict=True))
                    spans.append(
                        {"cycle": cycle, "phase": phase, "begin": begin, "end": time.monotonic()}
                        | {"asked": asked, "answered": answered}
                    )
                print(f"{server}: cycle {cycle + 1} of {cycles}", file=sys.stderr, flush=True)
    finally:
        process.kill()
        process.wait()
        log.close()
    steps = [line for line in lines_of(file) if "s" in line]
    for span in spans:
        ended = [one for one in steps if span["begin"] <= one["at"] <= span["end"]]
        inside = [one["s"] for one in ended if span["begin"] <= one["at"] - one["s"]]
        span["mean_s"] = statistics.fmean(inside) if inside else None
        first, last = (ended[0], ended[-1]) if ended else (steps[0], steps[0])  # validating
        for what in ("served_s", "handled", "at"):
            span[what] = last[what] - first[what]
        span["length"] = span["end"] - span["begin"]
    return {"spans": spans, "steps": steps}


def quartiles(values: list[float]) -> str:
    """Median and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def ratios(spans: list[dict[str, Any]], phase: str, beside: str) -> list[float]:
    """Mean step time of one phase over that of another, in each cycle."""
    by = {(span["cycle"], span["phase"]): span["mean_s"] for span in spans}
    pairs = [(by[n, phase], by[n, beside]) for n, name in by if name == phase]
    return [one / other for one, other in pairs if one and other]


def rate(spans: list[dict[str, Any]], what: str, *, per: str) -> float:
    """How much of something a second, in the phases in which the training is asked."""
    asked = [span for span in spans if span["phase"] == "asked"]
    whole = sum(s[per] for s in asked)  # 0: the training validated in every one of them
    return float(sum(s[what] for s in asked) / whole) if whole else float("nan")


def page(results: dict[str, dict[str, Any]], *, cycles: int) -> str:
    """The figures as Markdown."""
    quiet = results["ours"]
    steps = quiet["steps"]
    cpu_s, wall_s = sum(s["cpu_s"] for s in steps), sum(s["s"] for s in steps)
    typical = statistics.median(s["cpu_s"] for s in steps)
    rows = []
    for server, found in results.items():
        spans = found["spans"]
        alone = [s["mean_s"] for s in spans if s["phase"] == "none" and s["mean_s"]]
        cells = [
            server,
            f"{statistics.median(alone) * 1000:.0f} ms",
            f"{rate(spans, 'asked', per='length'):.0f}",
            f"{rate(spans, 'handled', per='at'):.0f}",
            f"{rate(spans, 'served_s', per='at'):.1%}",
            *(quartiles(ratios(spans, *pair)) for pair in PAIRS),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    shown = " | ".join(f"{one} / {other}" for one, other in PAIRS)
    return "\n".join(
        [
            "| server | step, nobody asks | asked a second | answered a second | CPU of its "
            f"threads | {shown} |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Ratios of mean step times: medians (quartiles) over {cycles} cycles of phases of "
            f"{PHASE_S:.0f} s.",
            "",
            f"Calls of metrics over {len(steps)} steps: {cpu_s / wall_s:.3%} of the step time (CPU "
            f"seconds of the training's thread inside them), {typical * 1e6:.0f} us of a step "
            "(median).",
        ]
    )


def head(cycles: int) -> str:
    """What was measured, and on what."""
    return f"""# What metrics cost a training

{datetime.date.today()}, {os.cpu_count()} cores of a shared machine, on which other work ran:

    FASHION12K=FOLDER python benchmarks/metrics/cost.py --cycles {cycles} \\
        --markdown docs/benchmarks/metrics.md

configs/fashion12k.yaml on a CPU, one rank with one thread. A client opens a thousand connections a
second, asks, and gives up after {PATIENCE_S} s; in the phases `decoy` it does the same to an
endpoint of another process: what it costs then is the client's. `ours` is the endpoint of a rank
(`vlal_dist/observability/metrics.py`), `prometheus_client` that library's own in its place.

Asked / decoy is what being asked costs a step. Other work on the machine makes such ratios vary by
more than a hundredth from phase to phase; the CPU seconds of the endpoint's threads, as a share of
one core, do not depend on it. Answered are also those that had given up.

"""


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "metrics_cost")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--train", type=Path, help="internal: train in this process")
    parser.add_argument("--server", choices=SERVERS, default="ours", help="internal")
    args, rest = parser.parse_known_args()
    if args.train:
        train(args.train, server=args.server, arguments=rest)
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (ROOT / "runs/fashion12k/dataset/dataset.json").exists():
        for stage in ("clean", "pack"):
            command = [sys.executable, "-m", "shard_tools", stage, *CONFIG]
            subprocess.run(command, cwd=ROOT, check=True)
    found = {name: measure(name, cycles=args.cycles, folder=args.folder) for name in SERVERS}
    text = page(found, cycles=args.cycles)
    print(text)
    if args.markdown:
        args.markdown.write_text(head(args.cycles) + text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
