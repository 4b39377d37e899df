"""The whole pipeline on rendered photos: `python -m vlal_dist.demo [--root runs/demo] [--quick]`.

Runs every stage as a user would type it and prints the command first. A stage that fails ends the
demo with its exit code. Repeating the command continues: finished stages find their output.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vlal_dist.demo import local_ray
from vlal_dist.errors import UsageError, VlalError

CONFIG = Path("configs/demo.yaml")
ROOT = "runs/demo"
RANKS = 2
DEEPSPEED_PORT = 29500
QUICK = ("--training.epochs", "1")
STOP_S = 30.0
"""How long a stage may take to save and leave when the demo is interrupted."""


class StageFailedError(VlalError):
    """A stage ended with an error; the demo ends with the same code."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"this command ended with code {code}: {shlex.join(command)}")
        # A negative code is the signal that ended it; shells report it as 128 + signal.
        self.exit_code = code if code > 0 else 128 - code


@dataclass(frozen=True)
class Plan:
    """What this run does.

    Attributes:
        root: folder of everything written.
        config: the configuration that the programs get.
        quick: fewer photos and epochs.
        environment: variables of every stage.
    """

    root: str
    config: Path
    quick: bool
    environment: Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlal_dist.demo", description=__doc__)
    parser.add_argument("--root", help=f"folder written (default {ROOT}, quick: {ROOT}-quick)")
    parser.add_argument("--quick", action="store_true", help="fewer photos, one epoch")
    given = parser.parse_args(argv)
    # Ctrl-C and a supervisor's SIGTERM end the stages in the same order.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        root = given.root or (f"{ROOT}-quick" if given.quick else ROOT)
        run_demo(_plan(root, quick=given.quick))
    except VlalError as error:
        sys.stderr.write(f"demo: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("demo: stopped; the same command continues\n")
        return 75
    return 0


def run_demo(plan: Plan) -> None:
    """All stages in order, then the table and the page's place."""
    quick = ["--quick"] if plan.quick else []
    config = ["--config", str(plan.config)]
    seconds: dict[str, float] = {}

    def stage(name: str, *command: str, extra: Mapping[str, str] | None = None) -> None:
        started = time.monotonic()
        run_stage(name, command, environment={**plan.environment, **(extra or {})})
        seconds[name] = time.monotonic() - started
        _say(f"{name}: {seconds[name]:.1f} s")

    stage("render", "python", "-m", "vlal_dist.demo.render", "--root", f"{plan.root}/data", *quick)
    stage("train_clip", "python", "-m", "vlal_dist.demo.train_clip", "--out", f"{plan.root}/clip")
    stage("clean", "python", "-m", "shard_tools", "clean", *config)
    stage("pack", "python", "-m", "shard_tools", "pack", *config)
    _score(plan, config, seconds)
    stage("merge", "python", "-m", "shard_tools", "merge", *config)
    train = ["deepspeed", "--num_accelerators", str(RANKS), *_rendezvous(), "vlal_dist/train.py"]
    train += [*config, *(QUICK if plan.quick else ())]
    stage("train", *train, extra={"DS_ACCELERATOR": "cpu"})
    evaluate = ["python", "-m", "vlal_dist.evaluate", *config]
    stage("constant", *evaluate, "--evaluation.predictor", "constant")
    stage("evaluate", *evaluate)
    stage("report", "python", "-m", "vlal_dist.report", *config)
    _say(_closing(plan, seconds))


def run_stage(name: str, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
    """Print a command, run it, and end it together with its children if we are interrupted.

    Raises:
        StageFailedError: it ended with another code than 0.
    """
    _say(f"\n=== {name}\n$ {shlex.join(command)}")
    try:
        # Its own session: the whole group can be signalled, as deepspeed's front process does not
        # end its ranks.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
    except OSError as error:
        raise VlalError(
            f"{command[0]} cannot be started: {error.strerror}; run make setup"
        ) from None
    try:
        code = process.wait()
    except KeyboardInterrupt:
        _end_group(process)
        raise
    if code != 0:
        raise StageFailedError(command, code)


def _score(plan: Plan, config: Sequence[str], seconds: dict[str, float]) -> None:
    """Score on a Ray of our own, submitted as on any cluster; then stop that Ray."""
    started = time.monotonic()
    _say("\n=== ray\nstarting a Ray head on this machine's loopback (README: the line to type)")
    with ExitStack() as closing:
        head = local_ray.start(plan.environment, num_cpus=os.cpu_count() or 1)
        closing.callback(local_ray.stop, head)
        seconds["ray start"] = time.monotonic() - started
        _say(f"ray: {head.address} after {seconds['ray start']:.1f} s")
        started = time.monotonic()
        job = ["python", "-m", "vlal_dist.score_clip", *config]
        submit = ["ray", "job", "submit", "--address", head.address, "--", *job]
        run_stage("score", submit, environment=head.environment)
        seconds["score"] = time.monotonic() - started
    _say(f"score: {seconds['score']:.1f} s")


def _rendezvous() -> list[str]:
    """Nothing, or another port where the launcher's usual one is taken."""
    try:
        socket.create_server(("127.0.0.1", DEEPSPEED_PORT)).close()
    except OSError:
        return ["--master_port", str(local_ray.free_ports(1)[0])]
    return []


def _plan(root: str, *, quick: bool) -> Plan:
    if not CONFIG.is_file():
        raise UsageError(f"{CONFIG} is not here; run the demo from the repository's folder")
    config = CONFIG
    if root != ROOT:
        # Every path of the demo lies below its root.
        Path(root).mkdir(parents=True, exist_ok=True)
        config = Path(root) / "demo.yaml"
        config.write_text(CONFIG.read_text(encoding="utf-8").replace(ROOT, root), encoding="utf-8")
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    }
    return Plan(root=root, config=config, quick=quick, environment=environment)


def _closing(plan: Plan, seconds: Mapping[str, float]) -> str:
    """Seconds of the stages, CLIP's AUC, the result table, the page."""
    scored = json.loads(Path(plan.root, "scores", "score_clip.result.json").read_text())
    auc = scored["counts"]["quality"]["auc"]
    lines = ["\n=== done", "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())]
    lines.append(f"total: {sum(seconds.values()):.0f} s")
    lines.append(f"CLIP's AUC on the training split: {auc:.3f} (0.5 knows nothing)")
    lines += ["", f"{'test split':<22}{'attributes':>12}{'constant':>12}{'trained':>12}   mAP, %"]
    results = [
        json.loads(Path(plan.root, "run", "evaluation", f"test-{name}", "result.json").read_text())
        for name in ("constant", "model")
    ]
    for constant, model in zip(results[0]["groups"], results[1]["groups"], strict=True):
        lines.append(_table_row(constant, model))
    if results[0]["truth"] and results[1]["truth"]:
        whole = [result["truth"]["groups"][0] for result in results]
        lines.append(_table_row({**whole[0], "name": "complete labels"}, whole[1]))
    lines += ["", f"page: {plan.root}/run/report.html"]
    return "\n".join(lines)


def _table_row(constant: Mapping[str, object], model: Mapping[str, object]) -> str:
    values = [group["mAP"] for group in (constant, model)]
    shown = "".join(f"{100 * v:>12.1f}" if isinstance(v, float) else f"{'-':>12}" for v in values)
    return f"{constant['name']!s:<22}{model['num_classes']!s:>12}{shown}"


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ask a stage and its children to leave; after a while, end them."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
