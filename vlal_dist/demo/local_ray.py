"""A Ray head on this machine's loopback, for the length of the demo.

Only this machine can reach it, and only with the token that it was started with. It is stopped by
its own process id: `ray stop` would end every Ray of the machine.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlal_dist.errors import VlalError

START_S = 90.0
"""How long a start may take; 7 to 10 seconds on two idle cores."""
STOP_S = 20.0


@dataclass(frozen=True)
class LocalRay:
    """A running head.

    Attributes:
        address: URL of the Jobs API.
        environment: variables that a client needs, the token among them; never printed.
        process: the `ray start --block` process.
        folder: its session folder, removed at the end.
    """

    address: str
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]
    folder: Path


@contextmanager
def local_ray(environment: Mapping[str, str], *, num_cpus: int) -> Iterator[LocalRay]:
    """Start a head, wait until its Jobs API answers, and stop it at the end.

    Args:
        environment: variables of the new process; `ray` is looked up on its PATH.
        num_cpus: CPUs it offers.

    Raises:
        VlalError: it ended, or did not answer in time; the message holds its last lines.
    """
    own = {
        **environment,
        # Despite its name: 0 keeps every listener on 127.0.0.1 (ray 2.60).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    own.pop("RAY_ADDRESS", None)
    port, dashboard, agent, client = free_ports(4)
    # A short name: socket names below it must fit into 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="vlal-"))
    command = [
        *("ray", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *(f"--num-cpus={num_cpus}", "--num-gpus=0", "--object-store-memory=100000000"),
        f"--temp-dir={folder}",
    ]
    with (folder / "head.log").open("wb") as log:
        # A session of its own: a Ctrl-C in the terminal reaches the demo, which stops the head.
        process = subprocess.Popen(
            command,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        head = LocalRay(f"http://127.0.0.1:{dashboard}", own, process, folder)
        _wait(head)
        yield head
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different: the sockets are held together."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait(head: LocalRay) -> None:
    token = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers=token)
    # A proxy in the environment must not carry the token away.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline, problem = time.monotonic() + START_S, "no answer"
    while time.monotonic() < deadline:
        if head.process.poll() is not None:
            problem = f"it ended with code {head.process.returncode}"
            break
        try:
            with opener.open(request, timeout=5):
                return
        except OSError as error:
            problem = str(error)
        time.sleep(0.25)
    log = (head.folder / "head.log").read_text(errors="replace").splitlines()[-8:]
    raise VlalError("the local Ray did not start: " + "\n".join([problem, *log]))
