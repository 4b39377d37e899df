"""Start the ranks of a job as real processes, the way a launcher does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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


def run_ranks(module: str, *arguments: str, world_size: int, timeout_s: float = 240) -> None:
    """Run `python -m module ARGUMENTS` on each rank; all must end with 0."""
    port = str(free_port())
    ranks = []
    for rank in range(world_size):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**environment(), **place},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, process in enumerate(ranks):
        assert process.returncode == 0, f"rank {rank}: {process.returncode}\n{outputs[rank]}"
