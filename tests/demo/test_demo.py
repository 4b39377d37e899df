"""The demo's configuration, and how it ends when a command fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlal_dist.config.load import load_config
from vlal_dist.demo.__main__ import write_config

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("quick", [False, True])
def test_the_config_is_valid_and_stays_below_its_root(tmp_path: Path, quick: bool) -> None:
    root = str(tmp_path / "here")
    config = load_config(str(write_config(root, quick=quick)), {})
    for name, value in config.paths:
        assert value.startswith(root), name
    assert config.evaluation.truth == f"{root}/data/truth.parquet"
    assert config.training.epochs == (1 if quick else 16)
    shipped = load_config("demo", {})
    assert config.method == shipped.method and config.model == shipped.model


def test_a_failing_command_ends_the_demo_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder of photos should be")
    command = [sys.executable, "-m", "vlal_dist.demo", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "demo: error: this command ended with code 1: python -m vlal_dist.demo" in done.stderr
