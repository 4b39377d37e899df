"""What metrics cost a training: their calls, and scrapers that ask a thousand times a second.

    FASHION12K=FOLDER python benchmarks/metrics_cost.py [--cycles 20] [--markdown FILE]

Trains on real photos (configs/fashion12k.yaml, draws without CLIP; packed if absent) with the real
trainer in a process of its own, which notes when each step ended, and the CPU seconds of its thread
inside the calls of `TrainMetrics`. Meanwhile phases of some seconds alternate:

* none: nobody asks;
* decoy: a thousand connections a second, to an endpoint of a process that does nothing else;
* asked: the same, to the training.

Asked beside none is what a scraper costs that runs on the training's own two cores; asked beside
decoy is what is left of that if it runs elsewhere. The same once more with prometheus_client's own
HTTP server in the place of our endpoint.
"""

import argparse
import contextlib
import datetime
import json
import os
import resource
import selectors
import socket
import socketserver
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONFIG = ["--config", "configs/fashion12k.yaml"]
TRAIN = [
    "--data.likelihood", "scores", "--method.draw_weights", "uniform", "--training.epochs", "1000",
    "--training.schedule", "constant", "--training.lr_new", "1e-4",
    "--training.checkpoint_epochs", "1000",
]  # fmt: skip
OFFERED_PER_S, PATIENCE_S, PHASE_S, SETTLE_S = 1000, 0.3, 4.0, 0.5
PHASES = ("none", "decoy", "asked")
SERVERS = ("ours", "prometheus_client")
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
CALLS = ("step", "times", "interval", "loader", "validation", "state", "saved", "resumed")


def train(file: Path, *, server: str, arguments: list[str]) -> None:
    """Train in this process; a line per step, and one with where it serves."""
    from vlal_dist import train as program
    from vlal_dist.observability import metrics
    from vlal_dist.observability.metrics import TrainMetrics
    from vlal_dist.program import run_program

    lines, spent, served = file.open("w", buffering=1), [0.0], [0.0]
    if server == "prometheus_client":
        metrics.Endpoint = _Theirs  # type: ignore[assignment,misc]

    def clocked(work: Any) -> Any:
        def call(*given: Any) -> None:
            before = time.thread_time()
            work(*given)
            served[0] += time.thread_time() - before

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
                line["served_s"] = served[0]
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


class _Theirs:
    """prometheus_client's server with our endpoint's face."""

    def __init__(self, render: Any, *, host: str, port: int) -> None:
        from prometheus_client import start_http_server

        registry = render.__closure__[0].cell_contents.registry
        self._server, _ = start_http_server(port, addr=host, registry=registry)

    def close(self) -> None:
        self._server.shutdown()


def decoy(told: Any, server: str) -> None:
    """An endpoint in a process without other work."""
    from tests.observability.exporter import Exporter
    from vlal_dist.observability import metrics

    if server == "prometheus_client":
        metrics.Endpoint = _Theirs  # type: ignore[assignment,misc]
    exporter = Exporter()
    exporter.begin()
    exporter.step()
    exporter.rarely()
    told.put(exporter.metrics.serve(host="127.0.0.1", port=29500))
    time.sleep(1e6)


def offer(port: Any, counts: Any) -> None:
    """Open a thousand connections a second to a port, ask, and give up soon; 0: nobody."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    chosen, under_way = selectors.DefaultSelector(), dict[socket.socket, float]()
    begun, started, to = 0, time.monotonic(), 0

    def drop(client: socket.socket) -> None:
        chosen.unregister(client)
        client.close()
        del under_way[client]

    while True:
        now = time.monotonic()
        if port.value != to:
            to, begun, started = port.value, 0, now
        while to and begun < (now - started) * OFFERED_PER_S:
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", to))
            chosen.register(client, selectors.EVENT_WRITE)
            under_way[client] = now
            begun += 1
            counts[0] += 1
        for key, mask in chosen.select(0.001):
            client = key.fileobj
            try:
                if mask & selectors.EVENT_WRITE:
                    client.send(REQUEST)
                    chosen.modify(client, selectors.EVENT_READ)
                elif part := client.recv(1 << 16):
                    counts[1] += part.startswith(b"HTTP")
                else:
                    drop(client)
            except OSError:
                drop(client)
        for client in [one for one, since in under_way.items() if now - since > PATIENCE_S]:
            drop(client)


@contextlib.contextmanager
def helpers(server: str) -> Iterator[tuple[int, Any, Any]]:
    """Port of the decoy; where the scraper asks; (asked, answered) of it."""
    context = get_context("spawn")
    port, counts, told = context.Value("i", 0), context.Array("q", 2, lock=False), context.Queue()
    others = [
        context.Process(target=decoy, args=(told, server), daemon=True),
        context.Process(target=offer, args=(port, counts), daemon=True),
    ]
    for one in others:
        one.start()
    try:
        yield told.get(timeout=120), port, counts
    finally:
        for one in others:
            one.kill()
            one.join()


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
        inside = [
            one["s"]
            for one in steps
            if span["begin"] <= one["at"] - one["s"] and one["at"] <= span["end"]
        ]
        span["steps"], span["mean_s"] = len(inside), statistics.fmean(inside)
        cpu = [one["served_s"] for one in steps if span["begin"] <= one["at"] <= span["end"]]
        span["served_s"] = cpu[-1] - cpu[0]
    return {"spans": spans, "steps": steps}


def quartiles(values: list[float]) -> str:
    """Median and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def ratios(spans: list[dict[str, Any]], phase: str, beside: str) -> list[float]:
    """Mean step time of one phase over that of another, in each cycle."""
    by = {(span["cycle"], span["phase"]): span["mean_s"] for span in spans}
    return [by[n, phase] / by[n, beside] for n, name in by if name == phase]


def rate(spans: list[dict[str, Any]], phase: str, what: str) -> float:
    """Connections a second in a phase."""
    chosen = [span for span in spans if span["phase"] == phase]
    return sum(s[what] for s in chosen) / sum(s["end"] - s["begin"] for s in chosen)


def page(results: dict[str, dict[str, Any]], *, cycles: int) -> str:
    """The figures as Markdown."""
    quiet = results["ours"]
    steps = quiet["steps"]
    cpu_s, wall_s = sum(s["cpu_s"] for s in steps), sum(s["s"] for s in steps)
    typical = statistics.median(s["cpu_s"] for s in steps)
    rows = []
    for server, found in results.items():
        spans = found["spans"]
        alone = statistics.median(s["mean_s"] for s in spans if s["phase"] == "none")
        rows.append(
            f"| {server} | {alone * 1000:.1f} ms | {rate(spans, 'asked', 'asked'):.0f} | "
            f"{rate(spans, 'asked', 'answered'):.0f} | {rate(spans, 'asked', 'served_s'):.2%} | {quartiles(ratios(spans, 'asked', 'none'))} | "
            f"{quartiles(ratios(spans, 'decoy', 'none'))} | "
            f"{quartiles(ratios(spans, 'asked', 'decoy'))} |"
        )
    return "\n".join(
        [
            "| server | step, nobody asks | asked a second | answered a second | CPU of its threads | "
            "asked / none | decoy / none | asked / decoy |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Medians (quartiles) over {cycles} cycles of the ratio of mean step times. Calls of "
            f"metrics over {len(steps)} steps: {cpu_s / wall_s:.3%} of the step time (CPU seconds "
            f"of the training's thread), {typical * 1e6:.0f} us of a step (median).",
        ]
    )


def main() -> int:
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
        head = f"{datetime.date.today()}, {os.cpu_count()} cores\n\n"
        args.markdown.write_text(head + text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
