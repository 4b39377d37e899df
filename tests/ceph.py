"""A throwaway Ceph RADOS Gateway (S3) on loopback for tests: one mon, one osd, one radosgw.

    python tests/ceph.py start DIR [--bluestore]     prints the AWS_* variables to export
    python tests/ceph.py stop DIR

Debian: apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common; runs as root.
All state is in DIR. memstore (the default) is fast and forgets everything at the stop, so its DIR
is used once; bluestore survives a stop and `kill -9`. Only processes started here are ended.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

DAEMONS = ("rgw", "osd", "mon")
ACCESS_KEY, SECRET_KEY = "vlal-test-access", "vlal-test-secret"
PORTS = 22  # radosgw, mon, and 20 of which the osd takes 4
START_TIMEOUT_S = 60.0

# Why some of these: without cephx radosgw hangs unless `ms mon client mode` is crc; a short paxos
# interval turns 10 s of pool creation into 1 s; tcp_nodelay saves 40 ms per small GET.
CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind ipv6 = false
ms bind msgr1 = false
ms bind port min = {osd_port}
ms bind port max = {last_port}
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
run dir = {dir}/run
admin socket = {dir}/run/$name.asok
log file = {dir}/log/$name.log
crash dir = {dir}/log
log to stderr = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 10000
[mon]
mon data = {dir}/mon
paxos propose interval = 0.05
paxos min wait = 0.01
mon data avail crit = 1
mon data avail warn = 2
[osd]
osd data = {dir}/osd
osd objectstore = {objectstore}
osd memory target = 1610612736
osd max object name len = 2048
osd class load list = *
osd class default list = *
memstore device bytes = 8589934592
bluestore block size = 21474836480
bluestore block create = true
[client]
rgw data = {dir}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw dns name = localhost
rgw thread pool size = 64
rgw rados pool pg num min = 1
rgw override bucket index max shards = 1
rgw dynamic resharding = false
rgw enable usage log = false
rgw enable ops log = false
"""


class CephError(RuntimeError):
    """The cluster could not be started; the message says why."""


def missing_reason() -> str | None:
    """Why no cluster can be started here, or None if it can be tried."""
    missing = [name for name in ("ceph-mon", "ceph-osd", "radosgw") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: ceph-mon ceph-osd radosgw ceph-common)"
    if os.geteuid() != 0:
        return "the Ceph daemons are started as root only"
    return None


class Cluster:
    """One cluster in one folder.

    Args:
        folder: all state; made if absent.
        bluestore: keep objects on disk instead of in memory.
        outlive: keep running when this process ends; otherwise even its `kill -9` ends the daemons.
    """

    def __init__(self, folder: Path, *, bluestore: bool = False, outlive: bool = False) -> None:
        self.folder = folder.resolve()
        self.bluestore = bluestore
        self.outlive = outlive
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def endpoint(self) -> str:
        """Where radosgw answers."""
        return f"http://127.0.0.1:{(self.folder / 'port').read_text()}"

    @property
    def pids(self) -> list[int]:
        """Process ids of the daemons that were started here."""
        return [child.pid for child in self._children.values()]

    def start(self) -> None:
        """Start what is not running and wait until S3 answers; CephError with the reason."""
        if reason := missing_reason():
            raise CephError(reason)
        try:
            if not (self.folder / "ceph.conf").exists():
                self._make()
            self._spawn("mon", "ceph-mon", "-i", "a", "-f")
            self._wait("ceph-mon", lambda: self._run("ceph", "-s", check=False) is not None)
            self._start_osd()
            if not (self.folder / "user").exists():
                user = ("--uid=test", "--display-name=test")
                keys = (f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
                self._run("radosgw-admin", "user", "create", *user, *keys)
                (self.folder / "user").touch()
            self._spawn("rgw", "radosgw", "-n", "client.rgw", "-f")
            self._wait("radosgw", self._answers)
        except BaseException:
            self.stop()
            raise

    def stop(self, *, kill: bool = False) -> None:
        """End our daemons: SIGTERM (or SIGKILL at once), SIGKILL after 10 s."""
        for name in DAEMONS:
            pid = self._alive(name)
            if pid is not None:
                os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
                if not _until(lambda name=name: self._alive(name) is None, timeout_s=10):
                    os.kill(pid, signal.SIGKILL)
            (self.folder / f"{name}.pid").unlink(missing_ok=True)
            if child := self._children.pop(name, None):
                child.wait()

    def _make(self) -> None:
        for name in ("mon", "osd", "rgw", "run", "log"):
            (self.folder / name).mkdir(parents=True)
        port, fsid = _free_ports(), str(uuid.uuid4())
        text = CONFIG.format(
            dir=self.folder,
            fsid=fsid,
            port=port,
            mon_port=port + 1,
            osd_port=port + 2,
            last_port=port + PORTS - 1,
            objectstore="bluestore" if self.bluestore else "memstore",
        )
        (self.folder / "port").write_text(str(port))
        (self.folder / "ceph.conf").write_text(text)
        monmap = str(self.folder / "monmap")
        address = f"[v2:127.0.0.1:{port + 1}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)

    def _start_osd(self) -> None:
        if not (self.folder / "osd.ready").exists():
            osd = str(uuid.uuid4())
            self._run("ceph", "osd", "new", osd)
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
            (self.folder / "osd.ready").touch()
        if self._alive("osd") is None:
            # After a kill the mon still believes in the old address, and radosgw waits for it.
            self._run("ceph", "osd", "down", "0", check=False)
        self._spawn("osd", "ceph-osd", "-i", "0", "-f")
        self._wait("ceph-osd", lambda: "1 up" in (self._run("ceph", "osd", "stat") or ""))

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")}

    def _run(self, *command: str, check: bool = True) -> str | None:
        """Output of a finished command; None if it failed and `check` is off."""
        try:
            done = subprocess.run(
                command, env=self._environment(), capture_output=True, text=True, timeout=30
            )
        except subprocess.TimeoutExpired as error:
            if check:
                raise CephError(f"{command[0]} did not end in 30 s") from error
            return None
        if done.returncode == 0:
            return done.stdout
        if check:
            raise CephError(f"{' '.join(command[:3])}: {done.stderr.strip()[-500:]}")
        return None

    def _spawn(self, name: str, *command: str) -> None:
        if self._alive(name) is not None:
            return
        if not self.outlive:
            command = ("setpriv", "--pdeathsig", "KILL", *command)
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            child = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C of a test run must not end it before its clients
            )
        self._children[name] = child
        (self.folder / f"{name}.pid").write_text(f"{child.pid} {_start_time(child.pid)}\n")

    def _alive(self, name: str) -> int | None:
        """Pid of a daemon that we started and that still runs; a reused pid is not ours."""
        with suppress(FileNotFoundError):
            pid, started = (self.folder / f"{name}.pid").read_text().split()
            if _start_time(int(pid)) == started:
                return int(pid)
        return None

    def _answers(self) -> bool:
        if self._alive("rgw") is None:
            raise CephError(f"radosgw ended; its log is in {self.folder}/log")
        try:
            with urllib.request.urlopen(self.endpoint, timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:  # urllib's own errors are of this kind
            return False

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        if not _until(ready, timeout_s=START_TIMEOUT_S):
            raise CephError(
                f"{what} did not answer in {START_TIMEOUT_S:.0f} s; logs in {self.folder}/log"
            )


def _until(ready: Callable[[], bool], *, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _start_time(pid: int) -> str | None:
    """Start of a process in clock ticks since boot; None if it is gone or a zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None


def _free_ports() -> int:
    """First of PORTS neighbouring free ports, below the range that the kernel hands out."""
    for _ in range(100):
        first = random.SystemRandom().randrange(20000, 32000 - PORTS)
        with suppress(OSError):
            for port in range(first, first + PORTS):
                with closing(socket.socket()) as probe:
                    probe.bind(("127.0.0.1", port))
            return first
    raise CephError("no block of free ports between 20000 and 32000")


def main() -> int:
    parser = argparse.ArgumentParser(description="A throwaway Ceph S3 server on loopback.")
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bluestore", action="store_true", help="keep objects on disk")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.folder, bluestore=arguments.bluestore, outlive=True)
    if arguments.action == "stop":
        cluster.stop()
        return 0
    try:
        cluster.start()
    except CephError as error:
        sys.stderr.write(f"ceph: {error}\n")
        return 1
    print(f"export AWS_ENDPOINT_URL={cluster.endpoint} AWS_DEFAULT_REGION=us-east-1")
    print(f"export AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY}")
    print(f"export VLAL_TEST_S3_ENDPOINT={cluster.endpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
