"""Results of another dataset stand beside the run's own; data of tags alone can be evaluated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.test_programs import Runner, write_run
from tests.fixtures.tiny_dataset import write_dataset
from vlal_dist.evaluation.predictions import load_predictions
from vlal_dist.evaluation.results import TRAINED_ON
from vlal_dist.method.metrics import average_precision, counted_labels
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import open_store

NOTE = "unannotated pairs count as negative"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def trained_on(run: Path, *roots: Path) -> None:
    digests = [sha256_of(root / "dataset.json") for root in roots]
    (run / TRAINED_ON).write_text(json.dumps({"digests": digests}))


@pytest.mark.parametrize("recorded", [True, False])
def test_another_dataset_stands_beside_the_runs_own(
    tmp_path: Path, dataset_root: Path, recorded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_run(str(run))
    if recorded:
        trained_on(run, dataset_root)
    own = Runner(tmp_path, dataset_root, str(run))
    assert own("evaluate") == 0 and own("evaluate", "--evaluation.predictor", "constant") == 0
    before = {path: path.read_bytes() for path in (run / "evaluation").rglob("*.*")}
    other = write_dataset(tmp_path / "held", name="held out/2")
    (tmp_path / "elsewhere").mkdir()
    beside = Runner(tmp_path / "elsewhere", other, str(run))
    capsys.readouterr()
    assert beside("evaluate") == 0
    digest = sha256_of(other / "dataset.json")
    folder = run / f"evaluation/test-model@held-out-2-{digest[:8]}"
    said = capsys.readouterr()
    assert "another dataset than the run's own" in said.err and folder.name in said.err
    found = read(folder / "result.json")
    assert (found["dataset"]["name"], found["dataset"]["digest"]) == ("held out/2", digest)
    assert (folder / "evaluate.result.json").exists()
    assert before == {path: path.read_bytes() for path in before}
    # The report of each shows both, under their titles.
    assert own("report") == 0
    page = (run / "report.html").read_text()
    assert "On another dataset: held out/2, test" in page and "model on tiny" not in page
    assert beside("report") == 0
    page = (run / "report.html").read_text()
    assert "On another dataset: tiny, test" in page and "on held out/2, test</h1>" in page


def test_a_repeated_evaluation_of_the_own_dataset_overwrites(
    tmp_path: Path, dataset_root: Path
) -> None:
    run = tmp_path / "run"
    write_run(str(run))
    old = write_dataset(tmp_path / "old", name="old")
    assert Runner(tmp_path, old, str(run))("evaluate", "--evaluation.predictor", "constant") == 0
    trained_on(run, dataset_root)  # trained again, on other data
    own = Runner(tmp_path, dataset_root, str(run))
    assert own("evaluate", "--evaluation.predictor", "constant") == 0
    assert [path.name for path in (run / "evaluation").iterdir()] == ["test-constant"]
    assert read(run / "evaluation/test-constant/result.json")["dataset"]["name"] == "tiny"


def test_tags_are_evaluated_with_unannotated_as_negative_and_every_figure_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, root = tmp_path / "run", write_dataset(tmp_path / "tags", tags=True)
    write_run(str(run))
    runner = Runner(tmp_path, root, str(run))
    assert runner("evaluate", "--evaluation.predictor", "constant") == 0
    said = capsys.readouterr()
    assert "mAP undefined" in said.out and "set evaluation.unannotated negative" in said.err
    assert read(run / "evaluation/test-constant/result.json")["groups"][0]["mAP"] is None

    negative = ("--evaluation.unannotated", "negative")
    assert runner("evaluate", *negative) == 0
    said = capsys.readouterr()
    assert said.out.count(NOTE) == 2 and "undefined" not in said.out + said.err
    result = read(run / "evaluation/test-model/result.json")
    assert result["settings"]["unannotated"] == "negative"
    store = open_store(str(run / "evaluation" / "test-model"))
    predictions = load_predictions(store, "predictions.safetensors")
    assert (predictions.label >= 0).all()  # the file keeps what was annotated
    label = counted_labels(predictions.label, "negative")
    assert result["num_negative"] == (label < 0).sum() == (predictions.label == 0).sum()
    expected = np.mean(average_precision(predictions.score, label))
    assert result["groups"][0]["mAP"] == pytest.approx(expected)

    assert runner("report") == 0
    page = (run / "report.html").read_text()
    assert page.count(NOTE) >= 5
    assert "over annotated crops" not in page

    assert runner("export", "--paths.export", str(tmp_path / "export")) == 0
    card = (tmp_path / "export/README.md").read_text()
    assert NOTE in card and "annotated pairs only" not in card
