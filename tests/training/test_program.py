"""The train program: its imports, and what it refuses before training."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.rank_processes import ROOT, environment
from tests.fixtures.tiny_vaw import run
from tests.training.test_checkpoint import save
from vlal_dist.errors import ConfigError
from vlal_dist.storage.store import open_store
from vlal_dist.training.data import read_prior

STARTED_BY_PATH = """
import importlib.util, runpy, sys
sys.path[0] = FOLDER  # as Python does for `python vlal_dist/train.py`
names = runpy.run_path(FOLDER + "/train.py", run_name="started")
assert sys.path[0] == ROOT, sys.path[0]
assert "torch" not in sys.modules and "deepspeed" not in sys.modules
assert "vlal_dist" not in str(getattr(importlib.util.find_spec("evaluate"), "origin", ""))
import deepspeed, open_clip
assert names["PROGRAM"].name == "train"
"""


@pytest.mark.slow
@pytest.mark.deepspeed
def test_started_by_path_no_package_is_shadowed() -> None:
    folder = str(ROOT / "vlal_dist")
    code = f"FOLDER, ROOT = {folder!r}, {str(ROOT)!r}\n{STARTED_BY_PATH}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_help_lists_the_settings_without_importing_torch() -> None:
    code = "import sys, runpy; sys.argv = ['train.py', '--help']\n"
    code += "try: runpy.run_path('vlal_dist/train.py', run_name='__main__')\n"
    code += "except SystemExit as end: assert end.code == 0\n"
    code += "assert 'torch' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--training.batch_size" in done.stdout and "--resume" in done.stdout
    assert "--scoring.temperature" in done.stdout and "--scoring.model" not in done.stdout


def train(small: Path, *arguments: str) -> int:
    return run("vlal_dist.train", small / "config.yaml", *arguments)


def test_samples_without_likelihood_are_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = ["--paths.merged", str(small / "dataset"), "--paths.run", str(tmp_path)]
    assert train(small, *packed) == 65
    message = capsys.readouterr().err
    assert "run vlal score and vlal merge" in message


def test_another_seed_is_refused_at_a_resume(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(open_store(str(tmp_path)), 1)
    assert train(small, "--paths.run", str(tmp_path), "--training.seed", "5") == 65
    message = capsys.readouterr().err
    assert "seed is 5, the checkpoint has 99" in message
    assert f"the checkpoint has {'v' * 64}" in message


def test_unknown_flags_keys_and_splits_have_their_exit_codes(small: Path) -> None:
    assert train(small, "--resumee", "auto") == 2
    assert train(small, "--training.epoch", "3") == 64
    assert train(small, "--data.train_split", "nowhere") == 65


def test_psl_needs_a_prior_and_one_micro_batch() -> None:
    with pytest.raises(ConfigError, match="2 micro-batches per step"):
        read_prior("absent.parquet", [], micro_batches=2)
    with pytest.raises(ConfigError, match=r"needs method\.psl_prior"):
        read_prior(None, [], micro_batches=1)
    with pytest.raises(ConfigError, match="does not exist"):
        read_prior("absent.parquet", [], micro_batches=1)
