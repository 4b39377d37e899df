"""Servers that trackers talk to: a real MLflow, and one that accepts and never answers."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.training.processes import environment, free_port
from vlal_dist.processes import PROC

MARK = "VLAL_TEST_MARK"
"""Variable by which a test knows the processes that came of one of its own."""


class BlackHole(NamedTuple):
    """A server that takes every connection and says nothing.

    Attributes:
        address: where.
        came: set when somebody is waiting for it.
    """

    address: str
    came: threading.Event


@contextlib.contextmanager
def black_hole() -> Iterator[BlackHole]:
    """One, until the block ends."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        taken: list[socket.socket] = []
        came = threading.Event()

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(server.accept()[0])
                    came.set()

        threading.Thread(target=take, daemon=True).start()
        try:
            yield BlackHole(f"http://127.0.0.1:{server.getsockname()[1]}", came)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for one in taken:
                one.close()


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Address of an MLflow server that keeps its runs in `folder`."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'runs.sqlite'}"]
    command += ["--default-artifact-root", str(folder / "artifacts")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command,
            env={**environment(), **quiet},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not answers(f"{address}/health"):
            assert server.poll() is None and time.monotonic() < deadline, folder / "server.log"
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


def marked(pid: int, mark: str) -> bool:
    with contextlib.suppress(OSError):
        return f"{MARK}={mark}".encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return False


def left_behind(mark: str, *, seconds: float = 10.0) -> list[int]:
    """Processes with that mark in their environment that do not end within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        numbers = [int(name) for name in os.listdir(PROC) if name.isdecimal()]
        found = [pid for pid in numbers if marked(pid, mark)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
