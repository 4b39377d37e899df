"""Start the ranks of a job as real processes, the way a launcher does."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Ours without a launcher's variables, and with this interpreter's programs found."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    }
    programs = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    return {**inherited, "PATH": programs, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@cache
def _forks() -> ForkServerContext:
    """Ranks are forked from a process without threads that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.rank_imports"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, value in environment().items():
            patch.setenv(name, value)
        ensure_running()
    return context


def run_ranks(module: str, *arguments: str, world_size: int, timeout_s: float = 240) -> None:
    """Run `python -m module ARGUMENTS` on each rank; all must end with 0."""
    place = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(world_size)]
        ranks = [
            _forks().Process(
                target=_be_rank,
                args=(module, arguments, {**place, "RANK": str(n), "LOCAL_RANK": str(n)}, output),
            )
            for n, output in enumerate(outputs)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in ranks:
                process.kill()
                process.join()
        for rank, process in enumerate(ranks):
            said = outputs[rank].read_text() if outputs[rank].exists() else ""
            assert process.exitcode == 0, f"rank {rank}: {process.exitcode}\n{said}"


def _be_rank(module: str, arguments: Sequence[str], place: dict[str, str], output: Path) -> None:
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(place)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
