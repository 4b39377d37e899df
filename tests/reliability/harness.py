"""Starts trainings with faults, as users start them, and reads what they left behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fixtures.rank_processes import ROOT, environment, free_port

FAULTY = "tests/reliability/faulty_train.py"
DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
EPOCHS, BATCH = 3, 16
MARK = "VLAL_TEST_START"


class Start:
    """One start of a job: its processes are known by a variable that all of them inherit."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.began = time.time()
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env={**environment(), **env, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # What a script starts in the background ignores it, and so would all below it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def processes(self) -> dict[int, list[str]]:
        """Id and command of all that are left of it."""
        found = {}
        wanted = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words != [b""]:  # not a zombie
                found[int(folder.name)] = [word.decode() for word in words]
        return found

    def shared_memory(self) -> set[Path]:
        """The files of shared memory that its processes have mapped."""
        found = set()
        for pid in self.processes():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
                found |= {Path(x[x.index("/dev/shm/") :]) for x in lines if "/dev/shm/" in x}
        return found

    def find(self, program: str) -> int:
        """Id of the only process whose command names a program: `bin/deepspeed`, `launch`."""
        (pid,) = [
            pid
            for pid, words in self.processes().items()
            if any(word.endswith(program) for word in words[:4])
        ]
        return pid

    def wait(self, *, timeout_s: float = 240.0) -> int:
        """Until the command itself has ended; its exit code."""
        try:
            return self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s: {self.text()}") from None

    def wait_for_all(self, *, timeout_s: float = 60.0) -> float:
        """Until nothing of it is left; the seconds that took. Orphans fail the test."""
        began = time.monotonic()
        while left := self.processes():
            if time.monotonic() - began > timeout_s:
                self.kill()
                raise AssertionError(f"orphans after {timeout_s} s: {left}\n{self.text()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Kill all of its processes."""
        while left := self.processes():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        self.process.wait()


class Job:
    """A run root, its event log, and how it is started.

    Args:
        config: of the `small` dataset.
        folder: the run root is `folder/run`, unless `run` says otherwise.
        world_size: ranks of a start.
        supervised: under `python -m vlal_dist.supervise`.
        launcher: `deepspeed`, or `python` for a single rank without one.
        more: further words for the program.
    """

    def __init__(
        self,
        config: Path,
        folder: Path,
        *,
        run: str | None = None,
        world_size: int = 2,
        supervised: bool = False,
        launcher: str = "deepspeed",
        more: Sequence[str] = (),
    ) -> None:
        self.folder, self.run = folder, Path(run or folder / "run")
        self.event_log = folder / "events"
        self.event_log.mkdir(parents=True, exist_ok=True)
        self.world_size, self.supervised, self.launcher = world_size, supervised, launcher
        self.before: list[str] = []  # words in front of the command
        self.port = str(free_port())
        self.words = [
            FAULTY, "--config", str(config), "--paths.run", run or str(self.run),
            "--training.epochs", str(EPOCHS), "--training.log_steps", "1",
            "--training.checkpoint_steps", "2", "--model.width", "8",
            "--observability.metrics_port", str(free_port()),
            "--training.peer_timeout_s", "20", *more,
        ]  # fmt: skip

    def start(
        self,
        *faults: dict[str, Any],
        env: dict[str, str] | None = None,
        supervise: Sequence[str] = (),
    ) -> Start:
        command = [sys.executable, *self.words]
        if self.launcher == "deepspeed":
            ranks = ["--num_accelerators", str(self.world_size), "--master_port", self.port]
            command = [DEEPSPEED, *ranks, *self.words]
        if self.supervised:
            own = ["--supervise.backoff_s", "0.2", "--supervise.grace_s", "40", *supervise]
            command = [sys.executable, "-m", "vlal_dist.supervise", *own, "--", *command]
        variables = {"EVENTS": str(self.event_log), "FAULTS": json.dumps(faults), **(env or {})}
        return Start([*self.before, *command], variables, self.folder / "log.txt")

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """The events of all processes, in the order of time."""
        found = []
        for path in self.event_log.glob("*.jsonl"):
            lines = path.read_bytes().split(b"\n")
            found += [json.loads(line) for line in lines if line.endswith(b"}")]
        found.sort(key=lambda one: one["t"])
        return [one for one in found if event in (None, one["event"])]

    def wait_for(self, start: Start, met: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Until the event log shows something."""
        began = time.monotonic()
        while not met(self.events()):
            assert start.process.poll() is None, start.text()
            assert time.monotonic() - began < 200, start.text()
            time.sleep(0.02)

    def wait_for_step(self, start: Start, step: int) -> None:
        """Until every rank has made a step."""

        def met(events: list[dict[str, Any]]) -> bool:
            there = {e["rank"] for e in events if e["event"] == "step" and e["step"] >= step}
            return len(there) == self.world_size

        self.wait_for(start, met)

    def state(self) -> dict[str, Any]:
        """`state.json` of the newest complete checkpoint."""
        newest = sorted(path.parent for path in self.run.glob("checkpoints/*/COMPLETE"))[-1]
        found: dict[str, Any] = json.loads((newest / "state.json").read_text())
        return found

    def bits(self) -> dict[str, str]:
        """Digests of what the run ended with: weights, Adam, best model, every logged loss."""
        newest = sorted(path.parent for path in self.run.glob("checkpoints/*/COMPLETE"))[-1]
        files = {name: newest / f"{name}.safetensors" for name in ("model", "optimizer")}
        files["best"] = self.run / "best" / "model.safetensors"
        found = {name: sha256(path.read_bytes()) for name, path in files.items()}
        lines = [json.loads(x) for x in (self.run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("samples_per_s", None)
        found["metrics"] = sha256(json.dumps(lines).encode())
        return found

    def trained(self) -> dict[int, list[str]]:
        """Step -> the uids of the row set that counts: of the last time that it was made."""
        last: dict[int, dict[int, tuple[float, list[str]]]] = {}
        begun = 0.0
        for event in self.events():
            if event["event"] == "start":
                begun = max(begun, event["t"])
                for step in [one for one in last if one > event["step"]]:
                    del last[step]
            if event["event"] == "step":
                last.setdefault(event["step"], {})[event["rank"]] = (event["t"], event["uids"])
        return {
            step: sorted(uid for _, uids in ranks.values() for uid in uids)
            for step, ranks in sorted(last.items())
        }

    def lost_steps(self) -> list[int]:
        """For each start after the first: steps that had been made and had to be made again."""
        lost, made, starts = [], 0, 0
        for event in self.events():
            if event["event"] == "step":
                made = max(made, event["step"])
            if event["event"] == "start" and event["rank"] == 0:
                starts += 1
                if starts > 1:
                    lost.append(made - event["step"])
                made = event["step"]
        return lost

    def seconds_to_first_step(self) -> list[float]:
        """For each fault: from it to the first step that any rank made in the next start."""
        found = []
        for fault in self.events("fault"):
            begun = [e for e in self.events("start") if e["t"] > fault["t"]]
            if begun:
                after = [e["t"] for e in self.events("step") if e["t"] > begun[0]["t"]]
                found.append(min(after) - fault["t"])
        return found


def each_once_an_epoch(trained: dict[int, list[str]], *, steps: int) -> None:
    """Every epoch of `steps` steps holds the same samples, each once; nothing lost or doubled."""
    assert list(trained) == list(range(1, max(trained) + 1))
    epochs = [range(begin, begin + steps) for begin in range(1, max(trained) + 1, steps)]
    sets = [Counter(uid for step in epoch for uid in trained[step]) for epoch in epochs]
    assert all(set(one.values()) == {1} for one in sets)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def record(name: str, **figures: object) -> None:
    """Add figures to the file that `FIGURES` names, for docs/reliability.md."""
    path = os.environ.get("FIGURES")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **figures}) + "\n")
