"""evaluate and report, end to end on a small run, also with the run's root in a bucket."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from tests.conftest import S3Server
from tests.evaluation.test_predictors import write_scores
from tests.fixtures.tiny_dataset import SAMPLES, VOCABULARY
from tests.fixtures.tiny_vaw import run
from tests.release.test_saved_model import INFO, tiny_model
from vlal_dist import export, report
from vlal_dist.config.load import config_yaml, load_config
from vlal_dist.data.format.dataset import Dataset
from vlal_dist.evaluate import PROGRAM as EVALUATE
from vlal_dist.evaluation.predictions import load_predictions
from vlal_dist.program import run_program
from vlal_dist.release.saved_model import encode_weights, write_model
from vlal_dist.storage.store import open_store

CONFIG = "method: {num_ignore: 30, loss: selective}\ntraining: {batch_size: 4, seed: 99}\n"


def write_run(url: str) -> None:
    """What train would have left."""
    store = open_store(url)
    write_model(store, "best", encode_weights(tiny_model()), INFO)
    lines: list[dict[str, object]] = []
    for step in range(10, 200, 10):
        loss = 40 / step + 0.2 * (step % 3)
        lines.append({"kind": "train", "step": step, "loss": loss, "ignored_effective": 2.5})
        if step % 30 == 0:
            lines.append(
                {"kind": "validation", "epoch": step // 30, "step": step, "mAP": 0.3 + step / 500}
            )
    store.replace("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    store.replace("config.yaml", CONFIG.encode())


class Runner:
    """Runs a program on the tiny dataset with one run root."""

    def __init__(self, folder: Path, dataset_root: Path, run: str) -> None:
        self.run, self.config = run, folder / "config.yaml"
        self.config.write_text(
            json.dumps(
                {
                    "paths": {
                        "dataset": str(dataset_root),
                        "run": run,
                        "scores": str(folder / "scores"),
                        "cache": str(folder / "cache"),
                    },
                    "evaluation": {"top_k": 3, "example_attributes": 5, "examples": 8},
                }
            )
        )

    def __call__(self, program: str, *flags: str) -> int:
        chosen = {"evaluate": EVALUATE, "report": report.PROGRAM, "export": export.PROGRAM}[program]
        return run_program(chosen, ["--config", str(self.config), *flags])


@pytest.fixture
def runner(tmp_path: Path, dataset_root: Path) -> Runner:
    write_run(str(tmp_path / "run"))
    return Runner(tmp_path, dataset_root, str(tmp_path / "run"))


def test_evaluate_then_report(
    runner: Runner,
    dataset: Dataset,
    tmp_path: Path,
    truth_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_scores(dataset, tmp_path / "scores")
    truth = ("--evaluation.truth", str(truth_file))
    for predictor in ("model", "constant", "clip", "model"):  # the second model run overwrites
        assert runner("evaluate", "--evaluation.predictor", predictor, *truth) == 0
    shown = capsys.readouterr().out
    assert "selective (paper) on tiny, test" in shown and "mAP_complete" in shown

    folder = tmp_path / "run" / "evaluation" / "test-model"
    files = {"attributes.parquet", "evaluate.result.json", "predictions.safetensors", "result.json"}
    assert {path.name for path in folder.iterdir()} == files
    predictions = load_predictions(open_store(str(folder)), "predictions.safetensors")
    assert predictions.score.shape == (SAMPLES, len(VOCABULARY.attributes))
    table = pyarrow.parquet.read_table(folder / "attributes.parquet")
    assert np.allclose(table["mean_score"], predictions.score.mean(axis=0), atol=1e-6)
    constant = json.loads((tmp_path / "run/evaluation/test-constant/result.json").read_text())
    assert constant["model"] is None and constant["truth"]["groups"][0]["num_classes"] == 8

    compare = json.dumps([str(folder / "result.json")])
    assert runner("report", "--evaluation.compare", compare, *truth) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "rows 4" in capsys.readouterr().out
    assert "constant 0.5" in page and "CLIP, zero-shot" in page
    assert "NUM_IGNORE is 30; 2.50 unannotated attributes" in page
    assert page.count('<li class="example">') == 8
    assert "Not hand-picked" in page and "(truly " in page and "best 66 at step 180" in page
    assert "<script>alert" not in page and "<b>" not in page


def test_the_page_gathers_the_warnings_of_the_stages(runner: Runner, tmp_path: Path) -> None:
    def sections() -> list[str]:
        assert runner("report") == 0
        return re.findall(r'href="#(\w+)"', (tmp_path / "run/report.html").read_text())

    assert runner("evaluate") == 0
    assert "warnings" not in sections()
    text = "the AUC is 0.51 <chance>; give other weights"
    record = {"code": 0, "warnings": [{"key": "scoring.weights", "text": text}]}
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/score_clip.result.json").write_text(json.dumps(record))
    assert sections()[0] == "warnings"
    page = (tmp_path / "run/report.html").read_text()
    assert (
        "<div><dt>score</dt>\n<dd>the AUC is 0.51 &lt;chance&gt;; give other weights</dd>" in page
    )


def test_report_of_a_run_without_training_or_truth(
    runner: Runner, dataset_root: Path, tmp_path: Path
) -> None:
    bare = Runner(tmp_path, dataset_root, str(tmp_path / "bare"))
    assert bare("evaluate", "--evaluation.predictor", "constant") == 0
    assert bare("report", "--evaluation.predictor", "constant", "--evaluation.examples", "0") == 0
    page = (tmp_path / "bare" / "report.html").read_text()
    assert "no config.yaml" in page and "no metrics.jsonl" in page and "truly" not in page
    assert page.count("Left out: This run holds no config.yaml: nothing was trained here.") == 2


def test_report_of_a_trained_run_counts_what_it_ignored(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "run"))
    config = load_config(small / "config.yaml", {"method.num_ignore": "3"})
    store.replace("config.yaml", config_yaml(config).encode())
    start = {"step": 0, "version": "0.1.0", "commit": None, "torch": "2", "device": "Slow & Co"}
    start |= {"ranks": 2, "threads": 1, "cores": 4, "kernel": "cpu"}
    store.replace("starts.jsonl", json.dumps(start).encode() + b"\n")
    result = {"code": 0, "reason": "done", "counts": {"seconds": 75.2}}
    store.replace("train.result.json", json.dumps(result).encode())
    flags = ("--paths.run", store.url, "--evaluation.predictor", "constant")
    for program in ("vlal_dist.evaluate", "vlal_dist.report"):
        assert run(program, small / "config.yaml", *flags) == 0, capsys.readouterr().err
    page = (tmp_path / "run/report.html").read_text()
    assert "Left out" not in page and "1 min 15 s" in page and "Slow &amp; Co, 2 ranks" in page
    assert "method.draw_over feasible and seed 99" in page and 'class="calibration"' in page
    assert "8 photos" in page and "[" in page.split("95 % interval")[1].split("</tbody>")[0]


def test_what_is_absent_or_foreign_is_refused(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner("report") == 65
    assert "run vlal evaluate" in capsys.readouterr().err
    assert runner("evaluate", "--evaluation.split", "val") == 65
    assert "it has test" in capsys.readouterr().err
    assert runner("evaluate", "--evaluation.predictor", "clip") == 65
    assert "scores.json" in capsys.readouterr().err
    assert runner("evaluate", "--evaluation.predictor", "best") == 64
    assert runner("evaluate", "--paths.run", str(tmp_path / "nowhere")) == 74
    assert runner("evaluate", "--evaluation.predictor", "constant") == 0
    flags = ("--evaluation.predictor", "constant")
    assert runner("report", *flags, "--evaluation.compare", '["none.json"]') == 65
    result = tmp_path / "run/evaluation/test-constant/result.json"
    values = json.loads(result.read_text())
    values["dataset"]["digest"] = "0" * 64
    result.write_text(json.dumps(values))
    capsys.readouterr()
    assert runner("report", *flags) == 65
    said = capsys.readouterr().err
    assert "holds no evaluation/test-constant@tiny-" in said and "--paths.dataset" in said


def test_the_run_may_lie_in_a_bucket(dataset_root: Path, tmp_path: Path, moto_s3: S3Server) -> None:
    url = moto_s3.url()
    write_run(url)
    runner = Runner(tmp_path, dataset_root, url)
    assert runner("evaluate") == 0
    assert runner("report") == 0
    page = open_store(url).read("report.html").decode()
    assert moto_s3.env["AWS_SECRET_ACCESS_KEY"] not in page
    assert page.startswith("<!DOCTYPE html>")
