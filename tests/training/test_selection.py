"""Selection of the best model where the validation mAP is undefined, and splits without samples."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.rank_processes import ROOT, environment
from tests.fixtures.scored_dataset import write_scores
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from vlal_dist.config.sections import TrainingConfig
from vlal_dist.data.format.dataset import open_dataset
from vlal_dist.training.schedule import Schedule

NEGATIVE = ("--evaluation.unannotated", "negative")
TWO_EPOCHS = (
    *("--training.epochs", "2", "--training.max_steps", "4", "--training.batch_size", "36"),
    *("--observability.metrics", "false", "--observability.trackers", "[]"),
)


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a merged dataset in which nothing is annotated absent."""
    folder = tmp_path_factory.mktemp("made") / "tags"
    config = write_small_vaw(folder)
    for path in [folder / f"{split}.json" for split in ("train", "val", "test")]:
        instances = json.loads(path.read_text())
        path.write_text(json.dumps([one | {"negative_attributes": []} for one in instances]))
    run_all(config, ["clean", "pack"])
    write_scores(folder)
    run_all(config, ["merge"])
    return config


def train(config: Path, run_root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "vlal_dist.train", "--config", str(config), *TWO_EPOCHS]
    done = subprocess.run(
        [*command, "--paths.run", str(run_root), *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def validations(run_root: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_root / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "validation"]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_tags_keep_the_latest_model_until_the_option_gives_them_a_metric(
    tags: Path, tmp_path: Path
) -> None:
    said = train(tags, tmp_path)
    assert "the validation mAP is undefined: the latest model is kept as the best" in said
    assert "set evaluation.unannotated negative" in said
    assert "mAP undefined on val, the latest model is kept" in said
    assert "best_mAP undefined (the latest model is kept)" in said and "0.0000" not in said
    found = validations(tmp_path)
    assert [line["mAP"] for line in found] == [None, None] and all(line["best"] for line in found)
    model = json.loads((tmp_path / "best" / "model.json").read_text())
    assert model["validation_map"] is None and model["step"] == found[-1]["step"] == 4
    state = json.loads((tmp_path / "checkpoints" / "00000004" / "state.json").read_text())
    assert (state["best_map"], state["best_step"], state["unannotated"]) == (None, 4, "excluded")
    # The remedy that the message names works, also for a run that is resumed.
    more = ("--training.max_steps", "8", "--training.epochs", "4", *NEGATIVE)
    said = train(tags, tmp_path, *more)
    assert "evaluation.unannotated is negative, and was excluded before" in said
    assert "unannotated pairs as negatives, the best so far" in said and "undefined" not in said
    scores = [line["mAP"] for line in validations(tmp_path)[2:]]
    model = json.loads((tmp_path / "best" / "model.json").read_text())
    assert len(scores) == 2 and model["validation_map"] == max(scores) > 0
    assert "undefined" not in train(tags, tmp_path, *more)  # has ended; keeps its rule


def test_a_split_without_samples_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, option in (("train", "data.train_split"), ("val", "data.validation_split")):
        folder = tmp_path / split
        path = write_small_vaw(folder)
        (folder / f"{split}.json").write_text("[]")
        run_all(path, ["clean", "pack"])
        assert open_dataset(str(folder / "dataset"), cache=folder / "c").manifest["splits"][split]
        scored = ("--data.likelihood", "scores", "--method.draw_weights", "uniform")
        capsys.readouterr()
        assert run("vlal_dist.train", path, *scored) == 65
        said = capsys.readouterr().err
        assert f"split {split} holds no samples" in said and option in said
        assert "score" not in said.replace("data.likelihood scores", "")


def test_a_score_that_is_not_defined_cuts_nothing() -> None:
    schedule = Schedule(TrainingConfig(plateau_patience=0), {"head": 1e-3})
    assert not any(schedule.observe(None) for _ in range(5))
    assert schedule.rates_at(0.5) == {"head": 1e-3}
    assert not schedule.observe(0.5) and not schedule.observe(None) and schedule.observe(0.5)


def test_a_cut_is_said_only_while_a_rate_falls() -> None:
    schedule = Schedule(TrainingConfig(plateau_patience=0), {"head": 1e-6, "backbone": 1e-8})
    schedule.observe(0.5)
    cuts = [schedule.observe(0.4) for _ in range(6)]
    assert cuts == [True, True, False, False, False, False]
    assert schedule.rates_at(0)["head"] == pytest.approx(1e-8)
