"""Launcher detection on real process trees named like those of DeepSpeed and torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures.rank_processes import ROOT

RANK = """
import sys, time
from vlal_dist.training.stop import StopRequest, launcher_processes
launcher = launcher_processes()
print(len(launcher), flush=True)
while not StopRequest(launcher).requested:
    time.sleep(0.02)
print("gone", flush=True)
"""
START = "import subprocess, sys; sys.exit(subprocess.call({command!r}))\n"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """`bin/deepspeed`, a module `deepspeed.launcher.launch`, and `bin/torchrun`: each starts the
    next and waits."""
    rank = [sys.executable, "-c", RANK]
    for package in ("deepspeed", "deepspeed/launcher", "bin"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()  # before the real one
    launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--a=b"]
    (tmp_path / "bin/deepspeed").write_text(START.format(command=launch))
    (tmp_path / "bin/torchrun").write_text(START.format(command=rank))
    (tmp_path / "deepspeed/launcher/launch.py").write_text(START.format(command=rank))
    return tmp_path


def start(programs: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{programs}", "CROSS_SIZE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    for pid in [process.pid, *(int(p) for p in os.listdir("/proc") if p.isdecimal())]:
        try:
            if os.getpgid(pid) == process.pid:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def test_the_end_of_deepspeeds_front_process_is_noticed(programs: Path) -> None:
    process = start(programs, sys.executable, str(programs / "bin/deepspeed"))
    try:
        assert line(process) == "2"
        began = time.monotonic()
        process.kill()
        assert line(process) == "gone" and time.monotonic() - began < 5
    finally:
        end(process)


def test_the_end_of_torchrun_is_noticed_and_a_shell_is_not_watched(programs: Path) -> None:
    process = start(programs, sys.executable, str(programs / "bin/torchrun"))
    try:
        assert line(process) == "1"
        process.kill()
        assert line(process) == "gone"
    finally:
        end(process)
    process = start(programs, "sh", "-c", f"{sys.executable} -c '{RANK}'; true")
    try:
        assert line(process) == "0"
    finally:
        end(process)


def test_on_one_machine_of_several_only_the_local_launcher_is_watched(programs: Path) -> None:
    launch = f"{sys.executable} -u -m deepspeed.launcher.launch; true"
    process = start(programs, "sh", "-c", launch)  # as pdsh or srun start it
    try:
        assert line(process) == "1"
    finally:
        end(process)
