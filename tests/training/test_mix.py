"""A mixture of datasets, a subset, repeat factors: the ledgers of the epochs equal the plan."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.scored_dataset import write_scores
from tests.fixtures.tiny_vaw import run, write_small_vaw
from tests.integration.test_training_runs import arguments, finish, lines, start
from vlal_dist.config.sections import DataConfig, LossConfig, PathsConfig, ScoringConfig
from vlal_dist.data.format.dataset import open_dataset, open_split, read_labels
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.remarks import collected_remarks
from vlal_dist.training.data import open_data

pytestmark = pytest.mark.deepspeed

IMAGES = {"train": 8, "val": 4, "test": 4}


@pytest.fixture(scope="module")
def second(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged dataset of 24 other crops with the vocabulary and feasible sets of `small`."""
    folder = tmp_path_factory.mktemp("mix") / "second"
    config = write_small_vaw(folder, seed=7, images=IMAGES)
    assert run("clean", config, "--like", str(small / "merged")) == 0
    assert run("pack", config, "--pack.name", "second") == 0
    write_scores(folder)
    assert run("merge", config) == 0
    return folder / "merged"


def train(small: Path, out: Path, *more: str, code: int = 0) -> str:
    return finish(start([sys.executable, *arguments(small, out, *more)], {}), code=code)


def ledgers(out: Path) -> dict[int, dict[str, int]]:
    """Epoch -> its ledger after its last step."""
    return {line["epoch"]: line["ledger"] for line in lines(out) if line["kind"] == "train"}


@pytest.mark.slow
def test_a_mixture_is_trained_as_planned_and_cannot_change(
    small: Path, second: Path, tmp_path: Path
) -> None:
    mix = {str(small / "merged"): 0.5, str(second): 2}
    wanted = ["--data.mix", json.dumps(mix), "--data.epoch_end", "exact", "--training.seed", "5"]
    output = train(small, tmp_path / "run", *wanted)
    assert output.count("ledger equals the plan") == 2
    opened = [open_dataset(root, cache=tmp_path / "cache") for root in mix]
    corpus = ConcatSplits([open_split(one, "train") for one in opened])
    plan = EpochPlan(corpus, seed=5, passes=(0.5, 2.0))
    found = ledgers(tmp_path / "run")
    assert found == {epoch: plan.ledger(epoch).to_json() for epoch in (0, 1)}
    assert found[0]["count"] + found[1]["count"] == 72 + 2 * 2 * 24
    changed = ["--data.mix", json.dumps({**mix, str(second): 1}), *wanted[2:]]
    output = train(small, tmp_path / "run", *changed, code=65)
    assert "mix is" in output and "the checkpoint has" in output


def test_a_subset_with_repeats(small: Path, tmp_path: Path) -> None:
    dataset = open_dataset(str(small / "merged"), cache=tmp_path / "cache")
    keys = read_labels(dataset, "train")["key"].to_pylist()[:40]
    (tmp_path / "keys.txt").write_text("\n".join(keys) + "\n")
    options = ["--data.subset", str(tmp_path / "keys.txt"), "--data.repeat_threshold", "0.5"]
    train(small, tmp_path / "run", *options, "--data.epoch_end", "exact")
    counts = [one["count"] for one in ledgers(tmp_path / "run").values()]
    assert (
        len(counts) == 2 and min(counts) > 40
    )  # every key at least once, the rare ones more often
    state = json.loads(next((tmp_path / "run/checkpoints").glob("*/state.json")).read_text())
    assert state["binding"]["repeat_threshold"] == 0.5 and len(state["binding"]["subset"]) == 64


def test_datasets_that_do_not_belong_together_are_refused(
    small: Path, second: Path, tmp_path: Path
) -> None:
    def opened(mix: dict[str, float], subset: str | None = None) -> None:
        paths = PathsConfig(merged=str(small / "merged"), cache=str(tmp_path / "cache"))
        data = DataConfig(mix=mix, subset=subset)
        open_data(paths, data, LossConfig(), ScoringConfig())

    shutil.copytree(second, tmp_path / "copy")
    with pytest.raises(DataError, match=r"give each its own pack\.name"):
        opened({str(second): 1, str(tmp_path / "copy"): 1})
    config = write_small_vaw(tmp_path / "other", seed=9, images=IMAGES)
    for stage in ("clean", "pack"):
        assert run(stage, config) == 0
    with pytest.raises(DataError, match="clean it again with --like"):
        opened({str(tmp_path / "other/dataset"): 1})
    (tmp_path / "none.txt").write_text("no-such-key\n")
    with pytest.raises(ConfigError, match="1 of 1 keys are of no sample"):
        opened({}, subset=str(tmp_path / "none.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name in ("bytes.txt", "absent.txt"):
        with pytest.raises(ConfigError, match=rf"data\.subset: .*{name} cannot be read"):
            opened({}, subset=str(tmp_path / name))


def test_a_num_ignore_above_a_quarter_of_the_mean_set_is_remarked(
    small: Path, second: Path, tmp_path: Path
) -> None:
    roots = [str(small / "merged"), str(second)]
    opened = [open_dataset(root, cache=tmp_path) for root in roots]
    sizes = np.concatenate(
        [np.diff(one.feasible.indptr)[open_split(one, "train").index.object_id] for one in opened]
    )
    most, paths = int(sizes.mean() / 4), PathsConfig(merged=roots[0], cache=str(tmp_path))
    data = open_data(
        paths, DataConfig(mix=dict.fromkeys(roots, 1.0)), LossConfig(), ScoringConfig()
    )
    with collected_remarks() as kept:
        data.check_num_ignore("all")
        data.check_num_ignore(most)
        assert kept == []
        data.check_num_ignore(most + 1)
    assert f"method.num_ignore is {most + 1}, more than a quarter" in kept[0].text
    assert f"({sizes.mean():.1f} attributes)" in kept[0].text
    assert f"give at most {most} (docs/your-data.md)" in kept[0].text
