"""A process for the clients of W&B and MLflow: the trainer's end and the process itself.

These clients change the process that imports them: they hook its exit and wait there for their
server, start threads and processes, take seconds and 100 MB to import. In a process of their own
they cost training nothing and can be killed when they hang. Records are lines of JSON on its
standard input; when that ends, however the trainer ended, it has some seconds to deliver the rest.
"""

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from vlal_dist.observability.logs import setup_logging
from vlal_dist.observability.trackers import CLOSE_S, Record, Tracker, one_line, persist
from vlal_dist.storage.checks import masked

T = TypeVar("T")
logger = logging.getLogger(__name__)

GAVE_UP = 3
NICE = 5
"""Importing a client takes seconds of CPU; training gets three times its share of a core."""
ANSWER_S = 30.0
"""Wait for a server after which a line names it; clients themselves wait for minutes."""
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Variables whose values are kept out of what the clients print."""
ENVIRONMENT = {
    # Only records are sent: no usage statistics, console output, code, packages, hardware.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_CONSOLE": "off",
    "WANDB_MAX_END_OF_RUN_HISTORY_METRICS": "0",
    "WANDB_MAX_END_OF_RUN_SUMMARY_METRICS": "0",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_X_DISABLE_META": "true",
    "WANDB_X_DISABLE_STATS": "true",
    "WANDB_X_DISABLE_MACHINE_INFO": "true",
    "WANDB_X_SAVE_REQUIREMENTS": "false",
    # Its own 15 s would be lost when a launcher signals all processes below it, W&B's too.
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
}
"""Defaults of the process; the user's own variables win."""


class ProcessTracker(Tracker):
    """A tracker in a process of its own, seen from the trainer.

    Args:
        name: wandb or mlflow.
        identity: of the run, the same after a resume.
        folder: of the run, for what the client itself writes; None: not local.
    """

    def __init__(self, name: str, *, identity: str, folder: Path | None) -> None:
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,  # standard output is the program's own
            stderr=subprocess.STDOUT,
            bufsize=0,
            env={**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the trainer, which still has to log
        )
        self._said = threading.Thread(target=self._forward, name=f"output {name}", daemon=True)
        self._said.start()
        where = None if folder is None else str(folder)
        # A second less than the trainer's own wait, so that it can log how the process ended.
        self._seconds = CLOSE_S - 1
        settings = {"name": name, "identity": identity, "folder": where}
        self._send({"seconds": self._seconds, "settings": settings})

    def log(self, record: Record) -> None:
        """Send a record; blocks while the pipe is full.

        Raises:
            ConnectionError: the process has ended.
        """
        self._send(record._asdict())

    def close(self, *, done: bool) -> None:
        """Wait until the process has ended, which it does within its seconds.

        Raises:
            ConnectionError: it did not deliver all records.
        """
        self._send({"done": done})
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait()
        self._said.join(0.5)  # a client's own process may hold the pipe for longer
        if code:
            raise ConnectionError(f"{self._ended(code)}; the server may lack records")

    def abandon(self) -> None:
        """Kill the process; W&B's own process ends with it."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()

    def _forward(self) -> None:
        """Pass on what the clients print, without secrets, until the last process has ended."""
        assert self._process.stdout is not None
        with (
            self._process.stdout as pipe,
            open(pipe.fileno(), errors="replace", closefd=False) as said,
        ):
            for line in said:
                with contextlib.suppress(OSError, ValueError):  # if read no more, go on emptying
                    sys.stderr.write(without_secrets(line))
                    sys.stderr.flush()

    def _send(self, message: dict[str, object]) -> None:
        assert self._process.stdin is not None
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
        except OSError:
            raise ConnectionError(self._ended(self._process.poll())) from None

    def _ended(self, code: int | None) -> str:
        if code == GAVE_UP:
            return f"it did not deliver all records within {self._seconds:.0f} s"
        return f"its process {self._process.pid} ended with code {code}"


def main() -> int:
    """The process: open the tracker, feed it from standard input, close it."""
    setup_logging()
    os.nice(NICE)
    # A launcher signals all processes below it; this one has to outlive the trainer's last record.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    begin = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, args=(begin["seconds"],), daemon=True).start()
    threading.Thread(target=_redirect_output_when_stderr_closes, daemon=True).start()
    settings, name, done = begin["settings"], begin["settings"]["name"], False
    pause = threading.Event().wait  # never set: retries go on until the input ends
    watch = partial(watched, name=name)
    tracker = persist(partial(watch, partial(_open, **settings)), name=name, wait=pause)
    for line in sys.stdin:
        message = json.loads(line)
        if "done" in message:
            done = message["done"]
        else:
            persist(partial(watch, partial(tracker.log, Record(**message))), name=name, wait=pause)
    try:
        tracker.close(done=done)
    except Exception as error:
        logger.warning("tracker %s: %s", name, one_line(error))
        os._exit(GAVE_UP)  # the client's own hooks would only fail again
    return 0


def without_secrets(text: str) -> str:
    """A text without user information in URLs, and without the values of `SECRETS`."""
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return masked(text)


def address_of(name: str) -> str:
    """The server of a tracker, and the variable that names it."""
    variable = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_BASE_URL"}[name]
    return f"{masked(os.environ.get(variable) or 'https://api.wandb.ai')} ({variable})"


def watched(action: Callable[[], T], *, name: str) -> T:
    """Do something that needs the server of a tracker; log where no answer comes for long."""
    line = (
        "tracker %s: no answer from %s for %.0f s; training goes on, records wait; check the "
        "address and the network, or take it off observability.trackers"
    )
    timer = threading.Timer(ANSWER_S, logger.warning, (line, name, address_of(name), ANSWER_S))
    timer.daemon = True
    timer.start()
    try:
        return action()
    finally:
        timer.cancel()


def _open(*, name: str, identity: str, folder: str | None) -> Tracker:
    from vlal_dist.observability.tracker_clients import MlflowRun, WandbRun

    if name == "mlflow":
        return MlflowRun(identity)
    return WandbRun(identity, folder=None if "WANDB_DIR" in os.environ else folder)


def _end_with_input(seconds: float) -> None:
    """End the process some seconds after its input has ended, even if the client hangs."""
    _wait_for_hang_up(sys.stdin.fileno())
    time.sleep(seconds)
    os._exit(GAVE_UP)


def _redirect_output_when_stderr_closes() -> None:
    """Send output to /dev/null once its reader is gone, who may die with the trainer.

    W&B fails when it prints into a broken pipe, before it has written its last second.
    """
    _wait_for_hang_up(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _wait_for_hang_up(descriptor: int) -> None:
    """Wait until the other end of a pipe is closed; data still to be read does not matter."""
    hung_up = select.poll()
    hung_up.register(descriptor, 0)
    hung_up.poll()


if __name__ == "__main__":
    sys.exit(main())
