"""The demo's orchestration: config, failing stages, interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlal_dist.config.load import load_config
from vlal_dist.demo.__main__ import StageFailedError, config_below, run_stage

REPOSITORY = Path(__file__).parent.parent.parent


def test_the_config_is_valid_and_stays_below_its_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = load_config(str(config_below(str(tmp_path / "here"))), {})
    for value in config.paths.model_dump().values():
        assert str(value).startswith(str(tmp_path / "here"))
    assert config.evaluation.truth == str(tmp_path / "here" / "data" / "truth.parquet")
    assert config_below("runs/demo") == Path("configs/demo.yaml")


def test_a_failing_stage_is_named_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "raise SystemExit(65)"]
    with pytest.raises(StageFailedError, match="code 65") as caught:
        run_stage("clean", command, environment=os.environ)
    assert caught.value.exit_code == 65
    assert "=== clean" in capfd.readouterr().out


def test_the_demo_refuses_to_run_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlal_dist.demo"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "run the demo from the repository" in done.stderr


def test_an_interrupted_stage_leaves_no_process() -> None:
    script = (
        "import os, signal, sys\n"
        # A shell's background job is started with this signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from vlal_dist.demo.__main__ import run_stage\n"
        "child = 'import os, subprocess, sys, time;'"
        '\'p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]);\''
        "'print(os.getpid(), p.pid, flush=True); time.sleep(60)'\n"
        "run_stage('x', [sys.executable, '-c', child], environment=os.environ)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as front:
        assert front.stdout is not None
        lines = [front.stdout.readline() for _ in range(4)]
        pids = [int(word) for word in lines[-1].split()]
        front.send_signal(signal.SIGINT)
        front.wait(30)
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
