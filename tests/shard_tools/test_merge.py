"""Merging: likelihoods beside the crops, other bytes untouched, wrong scores refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.scored_dataset import TEMPERATURE, write_scores
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from tests.shard_tools.test_pack import tree
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.scores import (
    decode_scores,
    encode_scores,
    read_scores_manifest,
    read_shard_scores,
)
from vlal_dist.data.loading.likelihoods import ScoreLikelihoods
from vlal_dist.errors import DataError
from vlal_dist.storage.store import open_store


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    run_all(write_small_vaw(folder), ["clean", "pack"])
    write_scores(folder)
    run_all(folder / "config.yaml", ["merge", "verify"])
    return folder


def test_merged_samples_hold_eq_2_and_are_otherwise_unchanged(merged: Path) -> None:
    before = open_split(open_dataset(str(merged / "dataset"), cache=merged / "cache"), "train")
    dataset = open_dataset(str(merged / "merged"), cache=merged / "cache")
    after = open_split(dataset, "train")
    assert np.array_equal(before.index.uid, after.index.uid)
    store = open_store(str(merged / "scores"))
    manifest = json.loads(store.read("scores.json"))
    scores = read_shard_scores(
        store, "train", shard_sha256=before.shards[0].sha256, manifest=manifest
    )
    for row in range(before.shards[0].samples):
        old, new = SampleReader(before).read(row), SampleReader(after).read(row)
        assert (old.jpg, old.key, old.positive, old.negative) == (
            new.jpg, new.key, new.positive, new.negative,
        )  # fmt: skip
        similarity = scores.similarity[scores.indptr[row] : scores.indptr[row + 1]]
        weights = np.exp(similarity.astype(np.float64) / TEMPERATURE)
        assert new.log_likelihood is not None
        assert new.log_likelihood.dtype == np.float32
        assert np.allclose(np.exp(new.log_likelihood), weights / weights.sum(), rtol=1e-5)


def test_splits_without_scores_are_copied_byte_for_byte(merged: Path) -> None:
    for name in ("val", "test"):
        assert tree(merged / "dataset" / name) == tree(merged / "merged" / name)
    manifest = open_dataset(str(merged / "merged"), cache=merged / "cache").manifest
    assert manifest["likelihood"]["splits"] == ["train"]


def test_merging_is_the_same_for_any_worker_count_and_again(merged: Path, tmp_path: Path) -> None:
    config = merged / "config.yaml"
    assert run("merge", config, "--paths.merged", str(tmp_path), "--pack.workers", "2") == 0
    assert tree(tmp_path) == tree(merged / "merged")
    assert run("merge", config) == 0


def test_score_files_give_the_likelihoods_of_the_tars(merged: Path) -> None:
    dataset = open_dataset(str(merged / "dataset"), cache=merged / "cache")
    packed = open_split(dataset, "train")
    tars = open_split(open_dataset(str(merged / "merged"), cache=merged / "cache"), "train")
    store = open_store(str(merged / "scores"))
    manifest = read_scores_manifest(
        store,
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
    )
    scores = ScoreLikelihoods(
        packed, scores=store, manifest=manifest, temperature=TEMPERATURE, cache=merged / "cache"
    )
    reader = SampleReader(tars)
    for row in reversed(range(packed.num_samples)):
        values, indptr = scores(np.array([row]), [b""])
        assert np.array_equal(reader.read(row).log_likelihood, values)
        assert indptr.tolist() == [0, len(values)]
    with pytest.raises(DataError, match="not val"):
        ScoreLikelihoods(
            open_split(dataset, "val"),
            scores=store,
            manifest=manifest,
            temperature=TEMPERATURE,
            cache=merged / "cache",
        )


def test_scores_of_other_feasible_sets_are_refused(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = merged / "config.yaml"
    roots = [f"--paths.{name}={tmp_path / name}" for name in ("instances", "dataset", "merged")]
    for stage in ("clean", "pack"):
        assert run(stage, config, *roots, "--clean.feasible_splits", "[train, val]") == 0
    assert run("merge", config, *roots) == 65
    assert "feasible_digest" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["absent", "cut", "other shard", "wrong length"])
def test_damaged_scores_stop_the_merge(merged: Path, tmp_path: Path, damage: str) -> None:
    scores = tmp_path / "scores"
    shutil.copytree(merged / "scores", scores)
    files = sorted((scores / "train").iterdir())
    files[0].chmod(0o644)
    if damage == "absent":
        files[0].unlink()
    elif damage == "cut":
        files[0].write_bytes(files[0].read_bytes()[:-100])
    elif damage == "other shard":
        files[0].write_bytes(files[1].read_bytes())
    else:
        found = decode_scores(files[0].read_bytes(), where="x")
        indptr = found.indptr.copy()
        indptr[1:] = np.minimum(indptr[1:] + 1, len(found.similarity))
        changed = type(found)(found.uid, found.embedding, indptr, found.similarity, found.header)
        files[0].write_bytes(encode_scores(changed))
    arguments = (f"--paths.scores={scores}", f"--paths.merged={tmp_path / 'merged'}")
    assert run("merge", merged / "config.yaml", *arguments) == 65
    assert not (tmp_path / "merged/dataset.json").exists()


def test_scoring_must_have_finished(merged: Path, tmp_path: Path) -> None:
    arguments = (f"--paths.scores={tmp_path}", f"--paths.merged={tmp_path / 'merged'}")
    assert run("merge", merged / "config.yaml", *arguments) == 65
