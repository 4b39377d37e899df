"""The program in this process: counts, repetition, refusals, quality, S3."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests.conftest import S3Server
from tests.fixtures.damaged_tars import upload
from tests.fixtures.scored_dataset import copy_merged
from tests.fixtures.tiny_vaw import run
from tests.scoring.conftest import Model, make_tiny_model
from tests.shard_tools.test_pack import tree
from vlal_dist.data.format.dataset import open_dataset, open_split, read_labels
from vlal_dist.data.format.scores import read_scores_manifest, read_shard_scores
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.scoring import embed, shard_task
from vlal_dist.scoring.worker import CANDIDATES
from vlal_dist.storage.store import open_store

PROGRAM = "vlal_dist.score_clip"


def flags(model: Model, scores: Path | str, *more: str) -> list[str]:
    return [
        *model.flags(),
        *("--paths.scores", str(scores)),
        *("--scoring.use_ray", "false"),
        *("--scoring.device", "cpu"),
        # Without the warm-up, which takes seconds.
        *([] if "--scoring.batch_size" in more else ["--scoring.batch_size", "8"]),
        *([] if "--scoring.decode_threads" in more else ["--scoring.decode_threads", "2"]),
        *more,
    ]


def counts(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def data_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*.safetensors"))
    }


def test_scores_every_split_once_and_again_not(
    dataset: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, json_file = tmp_path / "scores", tmp_path / "counts.json"
    call = flags(tiny, root, "--scoring.splits", "[train, val, test]", "--json", str(json_file))
    assert run(PROGRAM, dataset, *call) == 0
    first = counts(json_file)
    assert (first["shards_scored"], first["shards_skipped"], first["images"]) == (7, 0, 114)
    assert first["samples"] == 114
    assert first["device"] == "cpu"
    assert "SCORING ON THE CPU" in capsys.readouterr().err
    manifest = json.loads((root / "scores.json").read_text())
    assert {name: entry["samples"] for name, entry in manifest["splits"].items()} == {
        "train": 72,
        "val": 18,
        "test": 24,
    }
    assert manifest["settings"] == json.loads(next(root.glob("settings-*.json")).read_text())
    files = data_files(root)
    assert len(files) == 7 + 1
    # The same command again, with another batch size: nothing is scored, the old size is adopted.
    assert run(PROGRAM, dataset, *call, "--scoring.batch_size", "4") == 0
    second = counts(json_file)
    assert (second["shards_scored"], second["shards_skipped"], second["images"]) == (0, 7, 0)
    assert second["quality"] == first["quality"]
    assert "ignoring batch_size=4: " in capsys.readouterr().err
    # A lost file is scored again, to the same bytes.
    lost = sorted(root.glob("train/*.safetensors"))[1]
    lost.unlink()
    assert run(PROGRAM, dataset, *call) == 0
    assert counts(json_file)["shards_scored"] == 1
    assert data_files(root) == files


def test_plan_starts_nothing(dataset: Path, tiny: Model, tmp_path: Path) -> None:
    json_file = tmp_path / "counts.json"
    assert (
        run(PROGRAM, dataset, *flags(tiny, tmp_path / "s", "--json", str(json_file)), "--plan") == 0
    )
    plan = counts(json_file)
    data = open_dataset(str(dataset.parent / "dataset"), cache=tmp_path)
    shards = len(open_split(data, "train").shards)
    assert (plan["shards_pending"], plan["samples_pending"], plan["samples"]) == (shards, 72, 72)
    assert plan["prompts"] == plan["pairs"] == len(data.feasible.indices)
    assert not list((tmp_path / "s").rglob("*.safetensors"))
    assert not list((tmp_path / "s").glob("settings-*"))


def test_absent_weights_stop_before_anything(
    dataset: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With Ray enabled: were it started, this would take seconds and leave a session.
    call = [*tiny.flags(), "--paths.scores", str(tmp_path / "s"), "--scoring.use_ray", "true"]
    assert run(PROGRAM, dataset, *call, "--scoring.weights", str(tmp_path / "no.safetensors")) == 64
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("score_clip: error: scoring.weights")
    assert "no such file" in error
    assert run(PROGRAM, dataset, *call, "--scoring.templates", '["{colour}"]') == 64
    if not torch.cuda.is_available():
        assert run(PROGRAM, dataset, *call, "--scoring.device", "cuda") == 64
    assert not list((tmp_path / "s").rglob("*.safetensors"))


def test_another_scorer_under_the_same_root_is_refused(
    dataset: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "scores"
    assert run(PROGRAM, dataset, *flags(tiny, root)) == 0
    old = json.loads((root / "scores.json").read_text())
    other = make_tiny_model(tmp_path / "other", seed=9)
    assert run(PROGRAM, dataset, *flags(other, root)) == 65
    assert "was made with weights tiny.safetensors of sha256" in capsys.readouterr().err
    assert run(PROGRAM, dataset, *flags(tiny, root, "--scoring.precision", "bf16")) == 65
    named = re.findall("[0-9a-f]{64}", capsys.readouterr().err)
    assert named[0] == old["scorer_digest"] and named[1] != named[0]
    assert run(PROGRAM, dataset, *flags(tiny, root, "--scoring.temperature", "0.5")) == 65
    assert "temperature" in capsys.readouterr().err
    assert run(PROGRAM, dataset, *flags(tiny, root, "--scoring.splits", "[train, val]")) == 65
    assert "lacks val" in capsys.readouterr().err
    # The remedy works: the score files of train are kept.
    (root / "scores.json").unlink()
    assert run(PROGRAM, dataset, *flags(tiny, root, "--scoring.splits", "[train, val]")) == 0


def test_a_score_file_of_other_samples_is_found(
    dataset: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "scores"
    assert run(PROGRAM, dataset, *flags(tiny, root)) == 0
    first, second = sorted(root.glob("train/*.safetensors"))[:2]
    second.chmod(0o644)
    second.write_bytes(first.read_bytes())
    assert run(PROGRAM, dataset, *flags(tiny, root)) == 65
    assert "shard_sha256" in capsys.readouterr().err


def test_quality_is_that_of_the_annotations(dataset: Path, tiny: Model, tmp_path: Path) -> None:
    root, json_file = tmp_path / "scores", tmp_path / "counts.json"
    assert run(PROGRAM, dataset, *flags(tiny, root, "--json", str(json_file))) == 0
    quality = counts(json_file)["quality"]
    data = open_dataset(str(dataset.parent / "dataset"), cache=tmp_path)
    split, labels = open_split(data, "train"), read_labels(data, "train").to_pylist()
    store = open_store(str(root))
    manifest = read_scores_manifest(
        store,
        feasible_digest=data.feasible.digest,
        vocabulary_digest=data.vocabulary.digest,
    )
    truth, values, entropy, row = [], [], [], 0
    for shard in split.shards:
        scores = read_shard_scores(store, "train", shard_sha256=shard.sha256, manifest=manifest)
        for i in range(shard.samples):
            here = scores.similarity[scores.indptr[i] : scores.indptr[i + 1]]
            found = dict(zip(data.feasible.of(int(split.index.object_id[row])), here, strict=True))
            for kind in ("positive", "negative"):
                for attribute in labels[row][kind]:
                    truth.append(kind == "positive")
                    values.append(found[attribute])
            logs = log_likelihood(
                here, np.array([0, len(here)]), temperature=manifest["temperature"]
            )
            entropy.append(-(np.exp(logs) * logs).sum())
            row += 1
    assert quality["positives"] == sum(truth)
    assert quality["auc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-3)
    assert quality["entropy_nats"] == pytest.approx(np.mean(entropy), rel=1e-5)
    assert 0 < quality["entropy_nats"] <= quality["uniform_entropy_nats"] + 1e-6


def test_a_real_model_ranks_annotated_attributes_above_chance(
    dataset: Path, fashion: Model, tmp_path: Path
) -> None:
    json_file = tmp_path / "counts.json"
    assert run(PROGRAM, dataset, *flags(fashion, tmp_path / "s", "--json", str(json_file))) == 0
    assert counts(json_file)["temperature"] == pytest.approx(0.0411, abs=1e-4)
    assert counts(json_file)["quality"]["auc"] > 0.6  # rendered colours, a model of fashion photos


def test_through_s3(dataset: Path, tiny: Model, tmp_path: Path, moto_s3: S3Server) -> None:
    local = tmp_path / "local"
    assert run(PROGRAM, dataset, *flags(tiny, local)) == 0
    url, scores = moto_s3.url(), moto_s3.url()
    remote = ["--paths.dataset", url, "--paths.cache", str(tmp_path / "cache")]
    upload(open_dataset(str(dataset.parent / "dataset"), cache=tmp_path / "cache"), url)
    assert run(PROGRAM, dataset, *flags(tiny, scores, *remote)) == 0
    store = open_store(scores)
    for key, content in data_files(local).items():
        assert store.read(key) == content
    assert store.exists("scores.json")


def test_a_warm_up_chooses_once_for_all(dataset: Path, tiny: Model, tmp_path: Path) -> None:
    root, json_file = tmp_path / "scores", tmp_path / "counts.json"
    chosen = ["--scoring.batch_size", "null", "--scoring.decode_threads", "null"]
    call = flags(tiny, root, *chosen, "--json", str(json_file))
    assert run(PROGRAM, dataset, *call) == 0
    first = counts(json_file)
    assert first["batch_size"] in CANDIDATES and first["decode_threads"] == 1
    assert first["images_per_s_predicted_per_actor"] > 0
    assert sum(first["shares"].values()) == pytest.approx(1, abs=0.01)
    settings = next(root.glob("settings-*.json")).read_bytes()
    sorted(root.glob("train/*.safetensors"))[0].unlink()
    assert run(PROGRAM, dataset, *call, "--plan") == 0
    assert counts(json_file)["estimated_s"] > 0
    assert run(PROGRAM, dataset, *call) == 0
    assert next(root.glob("settings-*.json")).read_bytes() == settings


def test_rescored_equals_scored_and_opens_no_image(
    dataset: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    templates = [
        "--scoring.templates",
        '["a photo of {attribute} {object}", "{object}: {attribute}"]',
    ]
    assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "one")) == 0
    assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "two", *templates)) == 0
    json_file = tmp_path / "counts.json"
    again = [*templates, "--scoring.embeddings", str(tmp_path / "one"), "--json", str(json_file)]
    shards = sorted((dataset.parent / "dataset").glob("train/shards/*.tar"))
    hidden = [path.rename(path.with_suffix(".hidden")) for path in shards]
    try:
        assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "again", *again), "--plan") == 0
        assert not list((tmp_path / "again").glob("settings-*"))
        assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "again", *again)) == 0
    finally:
        for path in hidden:
            path.rename(path.with_suffix(".tar"))
    assert counts(json_file)["images"] == 0 and counts(json_file)["shards_scored"] == len(shards)
    assert data_files(tmp_path / "again") == data_files(tmp_path / "two")
    other = make_tiny_model(tmp_path / "other", seed=9)
    capsys.readouterr()
    assert run(PROGRAM, dataset, *flags(other, tmp_path / "no", *again)) == 64
    assert len(re.findall("[0-9a-f]{64}", capsys.readouterr().err)) == 2


def test_every_thread_that_computes_has_the_threads_of_the_settings(
    dataset: Path, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP keeps the number by thread; another one gives other last bits."""
    found: set[int] = set()
    similarities = shard_task.feasible_similarities

    def observed(*arguments: Any, **more: Any) -> Any:
        for pool in threadpoolctl.threadpool_info():
            if pool["user_api"] == "openmp" and "torch" in pool["filepath"]:
                found.add(pool["num_threads"])
        return similarities(*arguments, **more)

    monkeypatch.setattr(shard_task, "feasible_similarities", observed)
    three = ("--scoring.cpus_per_actor", "3")
    assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "one", *three)) == 0
    again = ("--scoring.embeddings", str(tmp_path / "one"), *three)
    assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "again", *again)) == 0
    assert found == {3}


def test_embeddings_of_a_gpu_are_rescored_without_one_and_again(
    dataset: Path, tiny: Model, tmp_path: Path
) -> None:
    assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "one")) == 0
    listed = tmp_path / "one" / "scores.json"
    manifest = json.loads(listed.read_text())
    manifest["settings"]["device"] = "cuda"
    listed.chmod(0o644)
    listed.write_text(json.dumps(manifest))
    again = flags(tiny, tmp_path / "again", "--scoring.embeddings", str(tmp_path / "one"))
    assert run(PROGRAM, dataset, *again) == 0
    sorted((tmp_path / "again").glob("train/*.safetensors"))[0].unlink()
    (tmp_path / "again" / "scores.json").unlink()
    assert run(PROGRAM, dataset, *again) == 0
    assert data_files(tmp_path / "again") == data_files(tmp_path / "one")


def test_embeddings_of_an_unfinished_or_older_root_are_refused(
    dataset: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = flags(tiny, tmp_path / "again", "--scoring.embeddings", str(tmp_path / "one"))
    assert run(PROGRAM, dataset, *again) == 65
    assert "has not finished there" in capsys.readouterr().err
    (tmp_path / "one").mkdir(exist_ok=True)
    (tmp_path / "one" / "scores.json").write_text('{"format": 0}')
    assert run(PROGRAM, dataset, *again) == 65
    assert "scores format 0, expected 1" in capsys.readouterr().err


def test_unusable_crops_are_listed_and_can_be_tried_again(
    dataset: Path,
    tiny: Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet, root, json_file = tmp_path / "quiet", tmp_path / "scores", tmp_path / "counts.json"
    call = flags(tiny, root, "--json", str(json_file))
    assert run(PROGRAM, dataset, *flags(tiny, quiet)) == 0
    cut, seen = embed.box_crop, []

    def cut_but_one(pixels: np.ndarray, box: tuple[float, ...]) -> Image.Image:
        seen.append(box)
        if len(seen) == 5:
            raise OSError("unsupported photo")
        return cut(pixels, box)

    monkeypatch.setattr(embed, "box_crop", cut_but_one)
    assert run(PROGRAM, dataset, *call, "--scoring.max_quarantined", "0") == 65
    assert "1 crops cannot be used" in capsys.readouterr().err
    seen.clear()
    shutil.rmtree(root)
    assert run(PROGRAM, dataset, *call) == 0
    ((uid, why),) = counts(json_file)["quarantined"]["train"].items()
    assert why == "unsupported photo"
    listed = json.loads((root / "scores.json").read_text())["quarantined"]
    assert listed == {"train": {uid: why}}
    # Said again by a run that finds the files, and scored by one that is asked to.
    assert run(PROGRAM, dataset, *call) == 0
    assert counts(json_file)["quarantined"] == listed
    assert run(PROGRAM, dataset, *call, "--retry-quarantined", "--plan") == 0
    assert counts(json_file)["shards_pending"] == 0 and (root / "scores.json").exists()
    assert run(PROGRAM, dataset, *call, "--retry-quarantined") == 0
    assert (counts(json_file)["shards_scored"], counts(json_file)["quarantined"]) == (1, {})
    assert data_files(root) == data_files(quiet)


@pytest.mark.slow
def test_shards_that_pack_renewed_are_scored_and_the_others_keep_their_scores(
    small: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Photo missing, pack, score, merge; photo restored, the same with --retry-rejected."""
    folder, photo = copy_merged(small, tmp_path / "data"), "photos/train3.jpg"
    config, json_file = folder / "config.yaml", tmp_path / "counts.json"
    for name in ("dataset", "merged"):
        shutil.rmtree(folder / name)
    (folder / photo).unlink()
    root, retry = folder / "scored", ("--retry-rejected",)
    call = flags(tiny, root, "--json", str(json_file))
    scores = ("--paths.scores", str(root))
    assert run("pack", config, "--pack.max_rejected", "1.0") == 0
    assert run(PROGRAM, config, *call) == run("merge", config, *scores) == 0
    before = data_files(root)

    shutil.copy(small / photo, folder / photo)
    assert run("pack", config, *retry) == 0
    capsys.readouterr()
    assert run(PROGRAM, config, *call) == 65
    assert "repeat with --retry-rejected: shards that stayed keep" in capsys.readouterr().err
    assert run(PROGRAM, config, *call, *retry, "--plan") == 0
    assert counts(json_file)["shards_pending"] == 1 and (root / "scores.json").exists()
    assert run(PROGRAM, config, *call, *retry) == 0
    assert counts(json_file)["shards_scored"] == 1
    after = data_files(root)
    assert before.items() <= after.items() and len(after) == len(before) + 1
    assert run(PROGRAM, config, *call) == 0  # from now on without the flag
    assert run("merge", config, *scores, *retry) == 0

    other = ("--paths.scores", str(tmp_path / "s"), "--paths.merged", str(tmp_path / "m"))
    assert run(PROGRAM, config, *call, *other[:2]) == run("merge", config, *other) == 0
    assert tree(folder / "merged") == tree(tmp_path / "m")


def test_other_weights_of_the_same_name_are_refused(
    dataset: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unfinished root goes on with the weights that it was created with, or not at all."""
    model = make_tiny_model(tmp_path / "m", seed=7)
    call = flags(model, tmp_path / "s")
    assert run(PROGRAM, dataset, *call) == 0
    assert str(tmp_path) not in (tmp_path / "s" / "weights.json").read_text()
    (tmp_path / "s" / "scores.json").unlink()
    make_tiny_model(tmp_path / "m", seed=8)
    assert run(PROGRAM, dataset, *call) == 65
    assert "was made with weights" in capsys.readouterr().err
    make_tiny_model(tmp_path / "m", seed=7)
    assert run(PROGRAM, dataset, *call) == 0
