"""Packing with `--engine ray`: the bytes of one process, on two nodes, also when one is lost."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.ray_processes import ROOT, WAIT_S, python, wait_until
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


def test_another_engine_is_refused(tmp_path: Path) -> None:
    assert run("pack", write_small_vaw(tmp_path), "--engine", "spark") == 2
