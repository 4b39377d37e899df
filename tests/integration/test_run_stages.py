"""`vlal run` with real stages: repeated, with other settings, killed in each stage."""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.fixtures.tiny_vaw import write_small_vaw
from tests.scoring.conftest import make_tiny_model
from vlal_dist.config.load import load_config
from vlal_dist.pipeline import stages_of
from vlal_dist.processes import descendants, is_alive

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(1500)]

REPOSITORY = Path(__file__).parents[2]


def write_run(folder: Path, *, epochs: int = 2) -> Path:
    """Photos, annotations, a CLIP of random weights, and `config.yaml`, whose path is returned."""
    config = write_small_vaw(folder, images={"train": 20, "val": 4, "test": 8})
    clip = make_tiny_model(folder / "clip", seed=7)
    values = yaml.safe_load(config.read_text())
    values["paths"]["export"] = str(folder / "export")
    words = clip.flags()
    scoring = dict(zip((word.rpartition(".")[2] for word in words[::2]), words[1::2], strict=True))
    own = {"use_ray": False, "device": "cpu", "batch_size": 8, "decode_threads": 1}
    values["scoring"] = {**scoring, **own}
    values["training"] |= {"epochs": epochs, "checkpoint_steps": 1, "keep_checkpoints": 1}
    config.write_text(yaml.safe_dump(values))
    return config


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "vlal_dist", "run", "--config", str(config), *words]


def call(config: Path, *words: str) -> list[str]:
    """Run to the end; the titles of the stages that ran."""
    done = subprocess.run(
        command(config, *words), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line[4:].partition(":")[0] for line in done.stdout.splitlines() if line[:3] == "==="]


def digests(folder: Path) -> dict[str, str]:
    """Every file of the roots that holds no times and no paths -> sha256."""
    roots = ("instances", "dataset", "scores", "merged", "export", "run/evaluation", "run/best",
             "run/checkpoints")  # fmt: skip
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for root in roots
        for path in sorted((folder / root).rglob("*"))
        if path.is_file()
        and not any(word in path.name for word in (".result.", ".config.", "-tmp-"))
    }


@dataclass(frozen=True)
class Run:
    """A run that was never stopped: its config, and its files when it had ended."""

    config: Path
    digests: dict[str, str]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = write_run(tmp_path_factory.mktemp("undisturbed"))
    assert call(config) == [stage.title for stage in stages_of(load_config(str(config), {}))]
    return Run(config, digests(config.parent))


def test_a_repeated_run_does_what_changed(undisturbed: Run) -> None:
    config = undisturbed.config
    folder = config.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert call(config) == []
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {"run.result.json", "run.config.yaml"}

    assert call(config, "--export.min_annotated", "1") == ["export"]
    assert call(config, "--export.min_annotated", "1", "--pack.workers", "2") == []
    page = call(config, "--evaluation.curves", "1", "--export.min_annotated", "1")
    assert page == ["report"]
    # Training goes on for an epoch more; pack, score and merge stay.
    longer = ("--training.epochs", "3")
    ran = call(config, *longer)
    assert ran[0] == "train" and "report" in ran and "pack" not in ran
    assert call(config, *longer) == []
    # Other settings do not continue it, and are refused until training starts over.
    done = subprocess.run(
        command(config, "--training.lr_new", "1e-4"),
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 64, done.stderr
    assert "training.lr_new 0.0007 -> 0.0001" in done.stderr
    remedy = done.stderr.rpartition("with: vlal ")[2].split()
    subprocess.run([sys.executable, "-m", "vlal_dist", *remedy], cwd=REPOSITORY, check=True)
    assert "train" not in call(config, "--training.lr_new", "1e-4")


@contextmanager
def started(config: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """`vlal run` in the background, and the file of its output."""
    log = config.parent / "log.txt"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command(config), cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        yield process, log


def wait_for_work(process: "subprocess.Popen[str]", log: Path, title: str, folder: Path) -> None:
    """Wait until a stage has printed something of its own; train: until it has saved."""
    while process.poll() is None:
        _, found, rest = log.read_text().partition(f"=== {title}: ")
        saved = title != "train" or list((folder / "run/checkpoints").glob("*/COMPLETE"))
        if found and rest.count("\n") > 2 and saved:
            return
        time.sleep(0.01)
    raise AssertionError(f"ended before {title}: {log.read_text()}")


def test_kills_in_each_stage_leave_no_trace(undisturbed: Run, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    for stage in stages_of(load_config(str(config), {})):
        with started(config) as (process, log):
            wait_for_work(process, log, stage.title, tmp_path)
            family = [psutil.Process(process.pid), *descendants(psutil.Process(process.pid))]
            for one in family:
                one.kill()
    call(config)
    assert call(config) == []
    assert digests(tmp_path) == undisturbed.digests


LONG = 30
"""Epochs of a training that a signal reaches before its end."""


def test_a_signal_makes_the_stage_save_and_the_same_command_continues(tmp_path: Path) -> None:
    config = write_run(tmp_path, epochs=LONG)
    with started(config) as (process, log):
        wait_for_work(process, log, "train", tmp_path)
        children = descendants(psutil.Process(process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    assert children and not any(map(is_alive, children))
    assert "repeat the command to continue" in log.read_text()
    assert call(config)[0] == "train"


def test_a_killed_run_lets_its_stage_save_before_the_next_one_begins(tmp_path: Path) -> None:
    config = write_run(tmp_path, epochs=LONG)
    with started(config) as (process, log):
        wait_for_work(process, log, "train", tmp_path)
        process.kill()
    assert call(config)[0] == "train"
    assert "the same command resumes" in log.read_text()
