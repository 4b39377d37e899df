"""The whole pipeline on rendered photos: `python -m vlal_dist.demo [--root runs/demo] [--quick]`.

Prints each command before it runs it. A stage that fails ends the demo with its exit code.
Repeating the command continues: finished stages find their output.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlal_dist.errors import UsageError, VlalError

CONFIG = Path("configs/demo.yaml")
ROOT = "runs/demo"
RANKS = 2
DEEPSPEED_PORT = 29500
STOP_S = 30.0
"""How long a stage may take to save and leave when the demo is interrupted."""


class StageFailedError(VlalError):
    """A stage ended with an error; the demo ends with the same code."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"this command ended with code {code}: {shlex.join(command)}")
        # A negative code is the signal that ended it; shells report it as 128 + signal.
        self.exit_code = code if code > 0 else 128 - code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlal_dist.demo", description=__doc__)
    parser.add_argument("--root", help=f"folder written (default {ROOT}, quick: {ROOT}-quick)")
    parser.add_argument("--quick", action="store_true", help="fewer photos, one epoch")
    given = parser.parse_args(argv)
    # Ctrl-C and a supervisor's SIGTERM end the stages in the same order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_demo(given.root or (f"{ROOT}-quick" if given.quick else ROOT), quick=given.quick)
    except VlalError as error:
        sys.stderr.write(f"demo: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("demo: stopped; repeat the command to continue\n")
        return 75
    return 0


def run_demo(root: str, *, quick: bool) -> None:
    """All stages in order, then the result table and where the page is."""
    config = ["--config", str(config_below(root))]
    fewer, once = (["--quick"], ["--training.epochs", "1"]) if quick else ([], [])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}  # nothing is downloaded
    environment.pop("RAY_ADDRESS", None)  # score_clip starts a Ray of its own
    seconds: dict[str, float] = {}

    def stage(name: str, *command: str, **extra: str) -> None:
        started = time.monotonic()
        run_stage(name, command, environment={**environment, **extra})
        seconds[name] = time.monotonic() - started
        _say(f"{name}: {seconds[name]:.1f} s")

    python = ("python", "-m")
    stage("render", *python, "vlal_dist.demo.render", "--root", f"{root}/data", *fewer)
    stage("train_clip", *python, "vlal_dist.demo.train_clip", "--out", f"{root}/clip")
    stage("clean", *python, "shard_tools", "clean", *config)
    stage("pack", *python, "shard_tools", "pack", *config)
    stage("score", *python, "vlal_dist.score_clip", *config)
    stage("merge", *python, "shard_tools", "merge", *config)
    train = ("deepspeed", "--num_accelerators", str(RANKS), *_free_rendezvous())
    stage("train", *train, "vlal_dist/train.py", *config, *once, DS_ACCELERATOR="cpu")
    evaluate = (*python, "vlal_dist.evaluate", *config)
    stage("constant", *evaluate, "--evaluation.predictor", "constant")
    stage("evaluate", *evaluate)
    stage("report", *python, "vlal_dist.report", *config)
    _say(_closing(root, seconds))


def config_below(root: str) -> Path:
    """The demo's config, with every path below `root`.

    Raises:
        UsageError: this is not the repository's folder.
    """
    if not CONFIG.is_file():
        raise UsageError(f"{CONFIG} is not here; run the demo from the repository's folder")
    if root == ROOT:
        return CONFIG
    Path(root).mkdir(parents=True, exist_ok=True)
    config = Path(root) / "demo.yaml"
    config.write_text(CONFIG.read_text(encoding="utf-8").replace(ROOT, root), encoding="utf-8")
    return config


def run_stage(name: str, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
    """Print a command, run it, and end it together with its children if the demo is interrupted.

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


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ask a stage and its children to leave; after `STOP_S`, kill them."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()


def _free_rendezvous() -> list[str]:
    """Nothing, or another port where the launcher's usual one is taken."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", DEEPSPEED_PORT)):
        return []
    with socket.create_server(("127.0.0.1", 0)) as server:
        return ["--master_port", str(server.getsockname()[1])]


def _closing(root: str, seconds: Mapping[str, float]) -> str:
    """Seconds of the stages, CLIP's AUC, the result table, the page."""
    auc = _read(root, "scores", "score_clip.result.json")["counts"]["quality"]["auc"]
    lines = ["\n=== done", "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())]
    lines.append(f"total: {sum(seconds.values()):.0f} s")
    lines.append(f"CLIP's AUC on the training split: {auc:.3f} (chance: 0.5)")
    lines += ["", f"{'test split':<22}{'attributes':>12}{'constant':>12}{'trained':>12}   mAP, %"]
    constant, model = (
        _read(root, "run", "evaluation", f"test-{name}", "result.json")
        for name in ("constant", "model")
    )
    groups = list(zip(constant["groups"], model["groups"], strict=True))
    if constant["truth"] and model["truth"]:
        complete = {**constant["truth"]["groups"][0], "name": "complete labels"}
        groups.append((complete, model["truth"]["groups"][0]))
    for one, other in groups:
        values = [group["mAP"] for group in (one, other)]
        shown = "".join(f"{'-':>12}" if v is None else f"{100 * v:>12.1f}" for v in values)
        lines.append(f"{one['name']!s:<22}{other['num_classes']!s:>12}{shown}")
    return "\n".join([*lines, "", f"page: {root}/run/report.html"])


def _read(root: str, *parts: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(root, *parts).read_text(encoding="utf-8"))
    return values


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
