"""The whole pipeline on rendered photos: `vlal demo [--root runs/demo] [--quick]`.

Renders photos and trains a tiny CLIP, as far as they are not there, writes the configuration
ROOT/demo.yaml, and runs `vlal run` on it. Repeating the command continues.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlal_dist.config.load import INSTALLED
from vlal_dist.errors import Stopped, VlalError, require_modules
from vlal_dist.observability.logs import lasting_streams
from vlal_dist.processes import run_child

ROOT = "runs/demo"
"""Folder written by default; the installed configuration names its files below it."""
RANKS = 2
GRACE_S = 150.0
"""How long a command may take to save and leave when the demo is interrupted (seconds; longer than
`vlal run` gives its stages)."""


class CommandFailedError(VlalError):
    """A command ended with an error; the demo ends with the same code."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"this command ended with code {code}: {shlex.join(command)}")
        self.exit_code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, and return its exit code."""
    parser = argparse.ArgumentParser(prog="vlal demo", description=__doc__)
    parser.add_argument("--root", help=f"folder written (default {ROOT}, quick: {ROOT}-quick)")
    parser.add_argument("--quick", action="store_true", help="fewer photos, one epoch")
    given = parser.parse_args(argv)
    # Ctrl-C and a supervisor's SIGTERM end the commands in the same order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with lasting_streams():
        return _code(given.root or (f"{ROOT}-quick" if given.quick else ROOT), quick=given.quick)


def _code(root: str, *, quick: bool) -> int:
    """Run the demo; errors become a line and an exit code."""
    try:
        run_demo(root, quick=quick)
    except VlalError as error:
        sys.stderr.write(f"demo: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("demo: stopped; repeat the command to continue\n")
        return Stopped.exit_code
    return 0


def run_demo(root: str, *, quick: bool) -> None:
    """Photos, CLIP, configuration, and all stages on two ranks of the CPU.

    Raises:
        ConfigError: an extra of the package is not installed.
        CommandFailedError: a command ended with an error.
    """
    require_modules("open_clip", "ray", "deepspeed")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    environment["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    environment.pop("RAY_ADDRESS", None)  # score starts a Ray of its own
    fewer = ["--quick"] if quick else []
    run_python("vlal_dist.demo.render", "--root", f"{root}/data", *fewer, environment=environment)
    run_python("vlal_dist.demo.train_clip", "--out", f"{root}/clip", environment=environment)
    config = write_config(root, quick=quick)
    ranks = ("--ranks", str(RANKS))
    run_python("vlal_dist", "run", "--config", str(config), *ranks, environment=environment)


def write_config(root: str, *, quick: bool) -> Path:
    """Write the installed demo's configuration, with every path below `root`, to ROOT/demo.yaml."""
    text = (INSTALLED / "demo.yaml").read_text(encoding="utf-8").replace(ROOT, root)
    values: dict[str, dict[str, Any]] = yaml.safe_load(text)
    if quick:
        values["training"]["epochs"] = 1
    path = Path(root, "demo.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Written by vlal demo at each start. vlal run --config {shlex.quote(str(path))}\n\n"
    path.write_text(head + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def run_python(module: str, *words: str, environment: Mapping[str, str]) -> None:
    """Print a command and run it with this interpreter.

    Raises:
        CommandFailedError: it ended with another code than 0.
    """
    command = ["python", "-m", module, *words]
    sys.stdout.write(f"\n$ {shlex.join(command)}\n")
    sys.stdout.flush()
    code = run_child([sys.executable, *command[1:]], environment=environment, grace_s=GRACE_S)
    if code != 0:
        raise CommandFailedError(command, code)


if __name__ == "__main__":
    sys.exit(main())
