"""The supervisor on small commands: exit codes, restarts, orphans, signals. No training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from vlal_dist.processes import descendants, is_alive
from vlal_dist.supervise import resuming

ROOT = Path(__file__).resolve().parents[1]


def dispositions() -> None:
    """As for what a script starts in the background, but never as under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(*command: str, own: Sequence[str] = ()) -> subprocess.Popen[str]:
    words = ["--supervise.backoff_s", "0.05", *own, "--", *command]
    return subprocess.Popen(
        [sys.executable, "-m", "vlal_dist.supervise", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=dispositions,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def wait_for(path: Path) -> int:
    """The process id that a command writes."""
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return int(path.read_text())


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (2, 1), (64, 1), (65, 1), (75, 1), (74, 3)])
def test_only_temporary_failures_are_restarted(tmp_path: Path, code: int, starts: int) -> None:
    count = tmp_path / "count"
    command = f"echo x >> {count}; exit {code}"
    found, output = finish(start("sh", "-c", command, own=["--supervise.restarts", "2"]))
    assert found == code, output
    assert len(count.read_text().split()) == starts
    assert output.count("; restart ") == starts - 1


def test_a_command_that_recovers_ends_well(tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = f"echo x >> {count}; test $(wc -l < {count}) -ge 3 || kill -9 $$"
    assert finish(start("sh", "-c", command))[0] == 0


def test_the_programs_own_exit_code_counts_not_the_launchers(tmp_path: Path) -> None:
    script = 'echo 65 > "$VLAL_EXIT_FILE"; exit 247'
    assert finish(start("sh", "-c", script))[0] == 65
    code, output = finish(start("sh", "-c", "exit 247", own=["--supervise.restarts", "0"]))
    assert code == 247 and "failure 1 in a row" in output


def test_it_waits_for_orphans_and_kills_what_does_not_end(tmp_path: Path) -> None:
    done = tmp_path / "done"
    began = time.monotonic()
    assert finish(start("sh", "-c", f"(sleep 1; touch {done}) & exit 0"))[0] == 0
    assert done.exists() and time.monotonic() - began >= 1
    own = ["--supervise.grace_s", "0.5"]
    began = time.monotonic()
    code, output = finish(start("sh", "-c", "trap '' TERM; sleep 50 & exit 0", own=own))
    assert code == 0 and time.monotonic() - began < 20
    assert "killing 1 processes" in output


RANK = """
import os, signal, sys, time
from pathlib import Path
def leave(number, frame):
    Path(sys.argv[1] + ".got").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_goes_past_the_launcher_to_the_ranks(
    tmp_path: Path, number: signal.Signals
) -> None:
    rank = tmp_path / "rank"
    # A launcher that would kill its rank, if it got the signal itself.
    launcher = f"trap 'kill -9 $!; exit 9' TERM; RANK=0 {sys.executable} -c '{RANK}' {rank} & wait"
    process = start("bash", "-c", launcher + "; wait $!; exit $?")
    wait_for(rank)
    process.send_signal(number)
    process.send_signal(number)  # a second one does no harm
    code, output = finish(process)
    assert code == 75, output
    assert Path(f"{rank}.got").read_text() == "SIGTERM"


def test_a_command_without_ranks_gets_the_signal_itself(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    process = start(sys.executable, "-c", RANK, str(alone))
    wait_for(alone)
    process.terminate()
    assert finish(process)[0] == 75 and Path(f"{alone}.got").exists()


def test_a_launcher_that_was_terminated_is_not_started_again(tmp_path: Path) -> None:
    front = tmp_path / "front"
    process = start("sh", "-c", f"echo $$ > {front}; exec sleep 60")
    os.kill(wait_for(front), signal.SIGTERM)
    assert finish(process)[0] == 75


def test_a_killed_supervisor_ends_the_command(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    process = start(sys.executable, "-c", RANK, str(alone))
    pid = wait_for(alone)
    process.kill()
    finish(process)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and is_alive(psutil.Process(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Path(f"{alone}.got").read_text() == "SIGTERM"


def test_a_stop_during_the_pause_ends_it(tmp_path: Path) -> None:
    count = tmp_path / "count"
    process = start("sh", "-c", f"echo 1 > {count}; exit 1", own=["--supervise.backoff_s", "30"])
    wait_for(count)
    time.sleep(0.5)
    process.terminate()
    began = time.monotonic()
    assert finish(process)[0] == 75 and time.monotonic() - began < 10


def test_usage_errors_have_their_message() -> None:
    for words, code, part in (
        (["--"], 2, "no command"),
        (["--", "/nowhere/program"], 2, "/nowhere/program"),
        (["--supervise.restart", "3", "--", "true"], 64, "supervise.restarts"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "vlal_dist.supervise", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and part in done.stderr


def test_a_restart_resumes_from_the_newest_checkpoint() -> None:
    assert resuming(["t", "--resume", "none", "--a.b", "1"]) == [
        "t",
        "--resume",
        "auto",
        "--a.b",
        "1",
    ]
    assert resuming(["t", "--resume=old/run"]) == ["t", "--resume=auto"]
    assert resuming(["t"]) == ["t"]


def test_a_process_is_alive_until_it_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = psutil.Process(child.pid)
    assert is_alive(seen) and seen in descendants(psutil.Process())
    child.kill()
    deadline = time.monotonic() + 10
    while is_alive(seen):  # although its parent has not waited for it yet
        assert time.monotonic() < deadline
    child.communicate()
