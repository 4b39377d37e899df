"""Commands that are run to their end, and ended with their children."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vlal_dist.errors import VlalError
from vlal_dist.processes import is_alive, run_child

REPOSITORY = Path(__file__).parent.parent
FRONT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from vlal_dist.processes import run_child
child = '''
import os, subprocess, sys, time
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), p.pid, flush=True)
time.sleep(60)
'''
run_child([sys.executable, "-c", child], grace_s=20)
"""


def test_exit_codes() -> None:
    def code(program: str) -> int:
        return run_child([sys.executable, "-c", program], grace_s=5)

    assert code("raise SystemExit(65)") == 65
    assert code("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 128 + 9
    with pytest.raises(VlalError, match="no-such-program cannot be started"):
        run_child(["no-such-program"], grace_s=5)


def front() -> tuple["subprocess.Popen[str]", list[psutil.Process]]:
    """A process that runs a command with a child, and these two."""
    process = subprocess.Popen(
        [sys.executable, "-c", FRONT], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]


def wait_for_end(*processes: psutil.Process) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, processes))


def test_an_interruption_ends_the_command_and_its_children() -> None:
    process, children = front()
    with process:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    wait_for_end(*children)


def test_a_killed_parent_does_not_leave_the_command() -> None:
    process, (command, child) = front()
    with process:
        process.kill()
    wait_for_end(command)
    child.kill()


def test_a_command_that_does_not_leave_is_killed() -> None:
    script = FRONT.replace("import os, subp", "import signal\\nsignal.signal(15, signal.SIG_IGN)\\n"
                           "import os, subp").replace("grace_s=20", "grace_s=0.5")  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        children = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        process.send_signal(signal.SIGINT)
        process.wait(30)
    wait_for_end(*children)
