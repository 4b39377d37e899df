"""Scrapers do not change training: same exit code, same bits."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.fixtures.scrapers import hanging, scrape, tight_loop
from tests.integration.test_training_runs import arguments, finish, start, weights

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

HUNG = 5  # of each kind
EPOCHS, STEPS = 4, 16
WIDTH = 32  # of the network: it must train while the scrapers connect


def train(small: Path, run: Path, *more: str) -> tuple[subprocess.Popen[str], int]:
    """A training of one rank, and its configured port."""
    longer = ("--training.epochs", str(EPOCHS), "--model.width", str(WIDTH))
    command = arguments(small, run, *longer, *more)
    port = int(command[command.index("--observability.metrics_port") + 1])
    return start([sys.executable, *command], {}), port


@pytest.fixture(scope="module")
def undisturbed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run that is not scraped."""
    run = tmp_path_factory.mktemp("unwatched")
    finish(train(small, run)[0])
    return weights(run, STEPS)


def assert_same(run: Path, expected: dict[str, torch.Tensor]) -> None:
    found = weights(run, STEPS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.02)
    raise AssertionError("nothing listens")


def test_scrapers_that_hang_and_one_in_a_tight_loop_change_nothing(
    small: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    process, port = train(small, tmp_path)
    wait_for_port(port, process)
    with (
        hanging(port, number=HUNG, sent=b""),
        hanging(port, number=HUNG, sent=b"GET /metrics HTTP/1.1\r\nHost: x\r\n"),
        hanging(port, number=HUNG, sent=b"GET /metrics HTTP/1.1\r\n\r\n"),
        tight_loop(port, clients=2) as answered,
    ):
        seen = []
        while process.poll() is None:
            with contextlib.suppress(OSError):  # until it has ended
                seen.append(scrape(port))
        output = finish(process)
    assert "vlal_train_steps_total" in seen[-1] and answered
    assert "Traceback" not in output
    assert_same(tmp_path, undisturbed)


def test_without_a_port_it_trains_with_a_warning(
    small: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    process, _ = train(small, tmp_path, "--observability.metrics_host", "203.0.113.1")
    assert "no /metrics endpoint" in finish(process)
    assert_same(tmp_path, undisturbed)


def test_a_taken_port_is_replaced_by_the_next_free_one(
    small: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    targets = tmp_path / "targets"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process, _ = train(
            small, tmp_path / "run", "--observability.targets", str(targets),
            "--observability.metrics_port", str(port),
        )  # fmt: skip
        output = finish(process)
    served = int(output.partition("metrics: http://127.0.0.1:")[2].partition("/")[0])
    assert port < served < port + 64
    assert_same(tmp_path / "run", undisturbed)
