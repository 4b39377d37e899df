"""Packing with `--engine ray`: the bytes of one process, on two nodes, also when one is lost."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.ray_processes import ROOT, WAIT_S, python, wait_until
from tests.fixtures.scored_dataset import write_scores
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from tests.integration.test_scoring_faults import two_nodes
from tests.shard_tools.test_pack import tree

pytestmark = [pytest.mark.ray_cluster, pytest.mark.slow]


def test_a_lost_node_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_small_vaw(tmp_path)
    run_all(config, ["clean", "pack"])
    other, log = tmp_path / "other", tmp_path / "log"
    with two_nodes(tmp_path / "nodes", monkeypatch) as second, log.open("wb") as sink:
        words = ("pack", "--config", str(config), "--engine", "ray", "--paths.dataset", str(other))
        driver = subprocess.Popen(
            python("-m", "shard_tools", *words), cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            wait_until(lambda: list(other.glob("*/parts/*")) or driver.poll() is not None, log)
            os.kill(second, signal.SIGKILL)
            assert driver.wait(WAIT_S) == 0, log.read_text()
        finally:
            driver.kill()
            driver.wait()
    assert tree(other) == tree(tmp_path / "dataset")


def test_every_tool_writes_the_bytes_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And verify finds on the nodes what it finds in one process."""
    config = write_small_vaw(tmp_path)
    run_all(config, ["clean", "pack"])
    write_scores(tmp_path)
    run_all(config, ["merge"])
    assert run("reshard", config, "--paths.resharded", str(tmp_path / "resharded")) == 0
    with two_nodes(tmp_path / "nodes", monkeypatch):
        for tool, place in (("pack", "dataset"), ("merge", "merged"), ("reshard", "resharded")):
            other = tmp_path / "other" / place
            assert on_ray(tool, config, f"--paths.{place}", str(other)).returncode == 0
            assert tree(other) == tree(tmp_path / place), tool
        assert on_ray("verify", config).returncode == 0
        damaged = max((tmp_path / "merged/train/shards").iterdir())
        damaged.chmod(0o644)
        damaged.write_bytes(damaged.read_bytes()[:-1024])
        found = on_ray("verify", config)
    assert found.returncode == 65
    assert f"{damaged}: " in found.stderr and "the shard was altered or cut" in found.stderr


def on_ray(tool: str, config: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """A tool run to its end, with tasks on the Ray at RAY_ADDRESS."""
    return subprocess.run(
        python("-m", "shard_tools", tool, "--config", str(config), "--engine", "ray", *more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def test_another_engine_is_refused(tmp_path: Path) -> None:
    assert run("pack", write_small_vaw(tmp_path), "--engine", "spark") == 2


def test_a_task_lost_before_one_that_fails_is_repeated(tmp_path: Path) -> None:
    command = python("-m", "tests.fixtures.ray_lost_task", str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout.splitlines()[-1:] == ["[0, 1, 'two']"], done.stderr
