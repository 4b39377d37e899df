"""export: the files of the folder, the text of the card, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import S3Server
from tests.fixtures.tiny_dataset import HOSTILE, VOCABULARY
from tests.fixtures.tiny_vaw import run
from tests.release.conftest import Trained
from tests.release.test_saved_model import INFO, tiny_model
from vlal_dist.evaluation.predictions import load_predictions
from vlal_dist.release import onnx_export
from vlal_dist.release.model import load_model
from vlal_dist.release.saved_model import encode_weights, write_model
from vlal_dist.release.thresholds import Thresholds, learn_thresholds
from vlal_dist.storage.store import open_store

EXPORT = "vlal_dist.export"
ROOT = Path(__file__).resolve().parents[2]


def test_the_folder_holds_the_runs_model_and_its_thresholds(trained: Trained) -> None:
    files = ["README.md", "config.json", "model.safetensors", "thresholds.json"]
    assert sorted(path.name for path in trained.export.iterdir()) == files
    weights = (trained.run / "best/model.safetensors").read_bytes()
    assert (trained.export / "model.safetensors").read_bytes() == weights
    model = load_model(trained.export)
    assert model.info.vocabulary == VOCABULARY and model.info.model == INFO
    key = "evaluation/test-model/predictions.safetensors"
    found = load_predictions(open_store(str(trained.run)), key)
    expected = learn_thresholds(found, VOCABULARY.attributes, split="test", min_annotated=5)
    assert isinstance(expected, Thresholds) and model.thresholds == expected
    assert any(one.own for one in expected.attributes.values())


def test_the_card_has_results_and_its_three_lines_work(trained: Trained) -> None:
    card = (trained.export / "README.md").read_text()
    result = json.loads((trained.run / "evaluation/test-model/result.json").read_text())
    assert f"| overall | 8 of 8 | {100 * result['groups'][0]['mAP']:.2f} |" in card
    assert "own, " in card and "Loss `selective`, profile `paper`, seed 99" in card
    start = card.index("    import vlal_dist as vlal")
    lines = [line.strip() for line in card[start:].splitlines()[:3]]
    assert len(lines) == 3 and lines[2].startswith("model('photo.jpg', 'ball'")
    assert lines[0] in (ROOT / "README.md").read_text()
    lines[1] = lines[1].replace("FOLDER", str(trained.export))
    lines[2] = lines[2].replace("'photo.jpg'", "photo")
    scope = {"photo": torch.zeros(3, 80, 90, dtype=torch.uint8)}
    exec("\n".join([*lines[:2], f"answer = {lines[2]}"]), scope)
    assert len(scope["answer"]) == 5
    assert HOSTILE not in card and "<" not in card


def test_what_was_not_evaluated_is_left_out_with_the_reason(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--paths.export", str(tmp_path / "export"))
    assert run(EXPORT, trained.config, *flags, "--data.validation_split", "val") == 0
    remedy = "run vlal evaluate --evaluation.split val, and vlal export again"
    assert f"not evaluated on val; {remedy}" in capsys.readouterr().out
    assert load_model(tmp_path / "export").thresholds is None
    card = (tmp_path / "export/README.md").read_text()
    assert remedy in card and "| overall |" in card

    store = open_store(str(tmp_path / "run"))  # trained on since it was evaluated
    write_model(store, "best", encode_weights(tiny_model()), INFO)
    for path in (trained.run / "evaluation/test-model").iterdir():
        store.replace(f"evaluation/test-model/{path.name}", path.read_bytes())
    assert run(EXPORT, trained.config, *flags, "--paths.run", store.url) == 0
    assert load_model(tmp_path / "export").thresholds is not None
    values = json.loads(store.read("best/model.json"))
    store.replace("best/model.json", json.dumps({**values, "step": 999}).encode())
    assert run(EXPORT, trained.config, *flags, "--paths.run", store.url) == 0
    assert load_model(tmp_path / "export").thresholds is None
    card = (tmp_path / "export/README.md").read_text()
    assert card.count("is of another model or dataset") == 2 and "| overall |" not in card


def test_nothing_trained_and_a_graph_that_differs_write_nothing(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--paths.export", str(tmp_path / "export"))
    assert run(EXPORT, trained.config, *flags, "--paths.run", str(tmp_path / "none")) == 74
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    flags += ("--paths.run", str(trained.run), "--export.onnx", "true")
    assert run(EXPORT, trained.config, *flags) == 65
    monkeypatch.setattr(onnx_export, "PACKAGES", ("no_such_package",))
    assert run(EXPORT, trained.config, *flags) == 64
    assert not (tmp_path / "export").exists()


def test_to_a_bucket_with_onnx_and_back(trained: Trained, moto_s3: S3Server) -> None:
    url = moto_s3.url()
    assert run(EXPORT, trained.config, "--paths.export", url, "--export.onnx", "true") == 0
    store = open_store(url)
    config = json.loads(store.read("config.json"))
    assert config["onnx"]["largest_difference"] < 1e-5 and "model.onnx" in config["files"]
    assert "`model.onnx`" in store.read("README.md").decode()
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 70, 70), np.uint8))
    assert load_model(url)(image, "box") == load_model(trained.export)(image, "box")
