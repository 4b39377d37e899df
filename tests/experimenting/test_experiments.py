"""The command as users type it: what it refuses, and a whole table through a kill."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.fixtures.rank_processes import ROOT, environment
from vlal_dist.experiments import main

ROWS = ("selective", "num_ignore-0", "num_ignore-all")


def command(small: Path, root: Path, table: str, *more: str) -> list[str]:
    return [
        table, "--config", str(small / "config.yaml"), "--paths.experiments", str(root),
        "--experiments.seeds", "[99]", "--experiments.replicates", "50", *more,
    ]  # fmt: skip


def test_help_and_unknown_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main(["table2", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "ablations" in shown and "--experiments.num_ignores" in shown and "--plan" in shown
    for wrong, message in (
        ([], "ablations "),
        (["table3"], "unknown table 'table3'; the nearest is table"),
        (["--config", "x"], "unknown table '--config'"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("table", ["table1", "table2", "ablations"])
def test_a_plan_starts_and_writes_nothing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str
) -> None:
    root = tmp_path / "runs"
    assert main(command(small, root, table, "--plan")) == 0
    shown = capsys.readouterr().out
    assert f"to do   {root / 'selective' / 'seed-99'}" in shown and "done 0" in shown
    assert not root.exists()


def test_impossible_settings_are_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = command(small, tmp_path, "table1", "--plan")
    assert main([*remote, "--paths.experiments", "s3://bucket/x"]) == 64
    assert "must be a local path" in capsys.readouterr().err
    for key, value in (("seeds", "[]"), ("jobs", "0"), ("num_ignores", "[-1]")):
        assert main([*remote, f"--experiments.{key}", value]) == 64
    assert main(command(small, tmp_path, "table1", "--paths.dataset", str(tmp_path))) == 65


def test_a_run_of_other_settings_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "selective" / "seed-99"
    place.mkdir(parents=True)
    values = yaml.safe_load((small / "config.yaml").read_text())
    values["training"] |= {"epochs": 2, "threads": 7}
    (place / "config.yaml").write_text(yaml.safe_dump(values | {"method": {"margin": 0.05}}))
    values = yaml.safe_load((place / "config.yaml").read_text())
    values["training"]["epochs"] = 1
    assert main(command(small, tmp_path, "table1", "--plan")) == 64
    assert f"{place} was trained with training.epochs 2, now it is 1" in capsys.readouterr().err
    (place / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(command(small, tmp_path, "table1", "--plan")) == 0
    # The likelihoods of another dataset are other data.
    elsewhere = ("--paths.merged", str(tmp_path / "merged"))
    assert main(command(small, tmp_path, "table1", "--plan", *elsewhere)) == 64
    assert "paths.merged" in capsys.readouterr().err


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlal_dist.experiments", *arguments],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(arguments: list[str], code: int = 0) -> str:
    with start(arguments) as process:
        output = process.communicate(timeout=280)[0]
    assert process.returncode == code, output
    return output


def predictions(root: Path) -> list[bytes]:
    return [
        (root / row / "seed-99/evaluation/test-model/predictions.safetensors").read_bytes()
        for row in ROWS
    ]


def to_all(groups: list[int], number: signal.Signals) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):  # that run has just ended
            os.killpg(group, number)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.deepspeed
def test_killed_in_the_middle_and_repeated_the_table_is_the_same(
    small: Path, tmp_path: Path
) -> None:
    """SIGKILL of the queue while a run trains; then of what it left; then the same command."""
    more = ("--experiments.num_ignores", "[]", "--method.num_ignore", "3")
    more += ("--training.epochs", "3", "--training.threads", "1", "--experiments.jobs", "2")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    output = finish(command(small, calm, "table2", *more))
    assert "3 of 3 runs done" in output and output.count("finished ") == 3

    again = command(small, killed, "table2", *more)
    first = start(again)
    saved = killed / "num_ignore-0/seed-99/checkpoints"
    deadline = time.monotonic() + 200
    while not saved.is_dir():  # an epoch is over, two are left
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    groups = [child.pid for child in psutil.Process(first.pid).children()]
    to_all(groups, signal.SIGSTOP)  # else they might be done before the next start is there
    first.kill()
    first.communicate()
    try:
        assert "processes that it started still write here" in finish(again, code=74)
    finally:
        to_all(groups, signal.SIGKILL)
    time.sleep(1)
    assert "started" in finish([*again, "--plan"])
    assert "3 of 3 runs done" in finish(again)
    assert predictions(killed) == predictions(calm)
    tables = [
        (root / "table2/table2.parquet").read_bytes() for root in (calm, killed)
    ]  # seconds are not in it
    assert tables[0] == tables[1]
    # Done already: nothing is trained, and other execution settings do not matter.
    shutil.rmtree(killed / "table2")
    assert "trained 0" in finish([*again, "--training.threads", "2"])
    assert (killed / "table2/table2.parquet").read_bytes() == tables[0]
