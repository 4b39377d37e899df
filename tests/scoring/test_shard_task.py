"""One shard: the same bytes each time, done once, equal to a plain open_clip loop, errors named."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image

from tests.scoring.conftest import Model
from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, open_split
from vlal_dist.data.format.index import Index, encode_index
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.scores import (
    ShardScores,
    decode_scores,
    encode_scores,
    quarantined_of,
    score_key,
)
from vlal_dist.errors import DataError, NotFoundError, Stopped
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.scoring.clip import ClipEncoder, PhaseSeconds
from vlal_dist.scoring.embed import EncoderLock, SplitShard, box_crop, embed_crops
from vlal_dist.scoring.identity import ScoreSettings, ScoringJob, identify
from vlal_dist.scoring.shard_task import commit_scores, feasible_similarities, shard_scores
from vlal_dist.scoring.text_bank import bank_key, encode_bank, ensure_bank, read_bank
from vlal_dist.scoring.worker import ShardScorer
from vlal_dist.storage.local import LocalStore
from vlal_dist.storage.store import Store, open_store

TEMPLATES = ["a photo of {attribute} {object}"]
SCORER = "5" * 64


def opened(config: Path) -> Dataset:
    paths = yaml.safe_load(config.read_text())["paths"]
    return open_dataset(paths["dataset"], cache=Path(paths["cache"]))


class Scored(NamedTuple):
    """What became of one shard."""

    scores: ShardScores
    created: bool
    identical: bool


def score(
    data: Dataset,
    split: Split,
    shard: int,
    store: Store,
    encoder: ClipEncoder,
    *,
    threads: int = 2,
) -> Scored:
    here = SplitShard(split, shard)
    bank = ensure_bank(
        store, encoder, data, templates=TEMPLATES, scorer_digest=SCORER, stop=Event()
    )
    with ThreadPoolExecutor(threads) as pool:
        embedded = embed_crops(
            SampleReader(split),
            here.rows,
            encoder=encoder,
            pool=pool,
            lock=EncoderLock(),
            seconds=PhaseSeconds(),
            stop=Event(),
        )
    header = {
        "scorer_digest": SCORER,
        "feasible_digest": data.feasible.digest,
        "vocabulary_digest": data.vocabulary.digest,
        "temperature": "0.01",
    }
    scores = shard_scores(embedded, here, bank=bank, feasible=data.feasible, header=header)
    return Scored(scores, *commit_scores(store, split.name, scores))


def score_file(store: Store, split: Split, shard: int) -> bytes:
    key = score_key(split.name, shard_sha256=split.shards[shard].sha256, scorer_digest=SCORER)
    return store.read(key)


def test_same_bytes_whatever_the_threads_and_done_once(
    dataset: Path, tiny: Model, tmp_path: Path
) -> None:
    data = opened(dataset)
    split = open_split(data, "train")
    files = []
    for threads in (1, 3):
        store = open_store(str(tmp_path / str(threads)))
        result = score(data, split, 1, store, tiny.load(), threads=threads)
        assert result.created and result.identical
        assert len(result.scores.uid) == split.shards[1].samples
        files.append(score_file(store, split, 1))
    assert files[0] == files[1]
    again = score(data, split, 1, store, tiny.load())
    assert not again.created and again.identical


def test_equals_a_plain_open_clip_loop(dataset: Path, fashion: Model, tmp_path: Path) -> None:
    data = opened(dataset)
    split, store = open_split(data, "train"), open_store(str(tmp_path))
    score(data, split, 0, store, fashion.load())
    scores = decode_scores(score_file(store, split, 0), where="test")
    open_clip.add_model_config(fashion.folder)
    net, _, preprocess = open_clip.create_model_and_transforms(
        "fashion_clip", pretrained=str(fashion.weights)
    )
    net.eval()
    tokenizer = open_clip.get_tokenizer("fashion_clip")
    reader = SampleReader(split)
    rows = SplitShard(split, 0).rows
    assert scores.uid.tolist() == split.index.uid[rows.start : rows.stop].tolist()
    assert scores.header["shard_sha256"] == split.shards[0].sha256
    for row in rows:
        sample = reader.read(row)
        x, y, w, h = (int(value) for value in sample.box_in_crop)
        crop = Image.fromarray(decode_jpeg(sample.jpg)).crop((x, y, x + w, y + h))
        name = data.vocabulary.objects[sample.object_id]
        attributes = data.feasible.of(sample.object_id)
        prompts = [f"a photo of {data.vocabulary.attributes[a]} {name}" for a in attributes]
        with torch.no_grad():
            image = net.encode_image(preprocess(crop)[None], normalize=True)
            cosine = (net.encode_text(tokenizer(prompts), normalize=True) @ image[0]).numpy()
        i = row - rows.start
        np.testing.assert_allclose(scores.embedding[i], image[0].numpy(), atol=2e-6)
        np.testing.assert_allclose(
            scores.similarity[scores.indptr[i] : scores.indptr[i + 1]], cosine, atol=2e-6
        )


def test_similarities_of_any_mix_of_objects() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([3, 0, 5, 1])
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    count = np.ones(9, np.int32)
    feasible = FeasibleSets(
        indptr, np.concatenate([np.arange(n) for n in sizes]).astype(np.int32), count, count
    )
    embedding = rng.normal(size=(7, 4)).astype(np.float32)
    bank = rng.normal(size=(9, 4)).astype(np.float32)
    object_id = np.array([2, 0, 1, 2, 3, 0, 1])
    rows, similarity = feasible_similarities(embedding, object_id, bank=bank, feasible=feasible)
    assert np.diff(rows).tolist() == sizes[object_id].tolist()
    for i, o in enumerate(object_id):
        expected = bank[indptr[o] : indptr[o + 1]] @ embedding[i]
        np.testing.assert_allclose(similarity[rows[i] : rows[i + 1]], expected, rtol=1e-5)


def test_the_raw_box_is_cut_with_each_number_truncated() -> None:
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    cut = np.asarray(box_crop(pixels, (2.9, 3.9, 10.9, 5.2)))
    np.testing.assert_array_equal(cut, pixels[3:8, 2:12])
    with pytest.raises(DataError, match="leaves nothing"):
        box_crop(pixels, (2.0, 3.0, 0.9, 5.0))
    with pytest.raises(DataError, match="leaves nothing"):
        box_crop(pixels, (40.0, 3.0, 5.0, 5.0))


class LateStore(LocalStore):
    """As a worker sees it that looked before another one committed."""

    def exists(self, key: str) -> bool:
        return False

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if self.looked:
            return super().read(key, offset=offset, length=length)
        self.looked = True
        raise NotFoundError(key)

    looked = False


def test_the_first_file_stands(dataset: Path, tiny: Model, tmp_path: Path) -> None:
    data = opened(dataset)
    split = open_split(data, "val")
    store, late = open_store(str(tmp_path)), LateStore(tmp_path)
    score(data, split, 0, store, tiny.load())
    twice = score(data, split, 0, late, tiny.load())
    assert not twice.created and twice.identical
    # A GPU whose last bits differ was first.
    first = decode_scores(score_file(store, split, 0), where="test")
    key = score_key("val", shard_sha256=split.shards[0].sha256, scorer_digest=SCORER)
    store.delete(key)
    other = encode_scores(replace(first, similarity=np.nextafter(first.similarity, np.float32(2))))
    store.create(key, other)
    loser = score(data, split, 0, late, tiny.load())
    assert not loser.created and not loser.identical
    assert score_file(store, split, 0) == other


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def damaged_copy(config: Path, folder: Path, *, fix_crc: bool) -> tuple[Dataset, Split, int]:
    """The dataset with one crop's JPEG zeroed; optionally with its new crc in the index."""
    source = opened(config)
    shutil.copytree(source.url, folder)
    data = open_dataset(str(folder), cache=folder)
    split = open_split(data, "train")
    row = SplitShard(split, 0).rows[2]
    columns = {name: np.array(value) for name, value in vars(split.index).items()}
    start = int(columns["offset"][row])
    tar = folder / split.shard_key(0)
    tar.chmod(0o644)
    content = bytearray(tar.read_bytes())
    jpg = start + int(columns["jpg_offset"][row])
    content[jpg : jpg + int(columns["jpg_length"][row])] = bytes(int(columns["jpg_length"][row]))
    tar.write_bytes(content)
    if fix_crc:
        import zlib

        stop = start + int(columns["length"][row])
        columns["crc32"][row] = zlib.crc32(content[start:stop])
        path = folder / "train" / "index.arrow"
        path.unlink()
        path.write_bytes(encode_index(Index(**columns)))
        data.manifest["splits"]["train"]["files"]["index.arrow"] = sha256(path.read_bytes())
        split = open_split(data, "train")
    return data, split, row


def test_a_crop_that_cannot_be_decoded_is_left_out_with_its_reason(
    dataset: Path, tiny: Model, tmp_path: Path
) -> None:
    data, split, row = damaged_copy(dataset, tmp_path / "data", fix_crc=True)
    store, whole = (open_store(str(tmp_path / name)) for name in ("scores", "whole"))
    scores = score(data, split, 0, store, tiny.load()).scores
    place = row - SplitShard(split, 0).rows.start
    uid = int(split.index.uid[row])
    assert list(quarantined_of(scores.header)) == [uid]
    assert "cannot be decoded" in json.loads(scores.header["quarantined"])[f"{uid:016x}"]
    here = slice(*scores.indptr[place : place + 2])
    assert not scores.embedding[place].any() and not scores.similarity[here].any()
    # All others are what they are without it.
    source = opened(dataset)
    expected = score(source, open_split(source, "train"), 0, whole, tiny.load()).scores
    others = np.arange(len(scores.uid)) != place
    np.testing.assert_allclose(scores.embedding[others], expected.embedding[others], atol=1e-6)
    assert decode_scores(score_file(store, split, 0), where="test").header == scores.header


def test_an_altered_shard_is_named(dataset: Path, tiny: Model, tmp_path: Path) -> None:
    data, split, row = damaged_copy(dataset, tmp_path / "data", fix_crc=False)
    with pytest.raises(DataError, match=f"row {row} .*crc32"):
        score(data, split, 0, open_store(str(tmp_path / "scores")), tiny.load())


def test_text_bank_is_computed_once(dataset: Path, tiny: Model, tmp_path: Path) -> None:
    data, store, encoder = opened(dataset), open_store(str(tmp_path)), tiny.load()

    def bank(templates: list[str]) -> np.ndarray:
        return encode_bank(encoder, data, templates, stop=Event())

    one, two = bank(["{attribute} {object}"]), bank(["{object} that is {attribute}"])
    both = bank(["{attribute} {object}", "{object} that is {attribute}"])
    mean = (one + two) / np.linalg.norm(one + two, axis=1, keepdims=True)
    np.testing.assert_allclose(both, mean, atol=1e-6)
    assert one.shape == (len(data.feasible.indices), 16)
    bank_of = {"templates": ["{attribute} {object}"], "scorer_digest": SCORER, "stop": Event()}
    np.testing.assert_array_equal(ensure_bank(store, encoder, data, **bank_of), one)
    # Another worker that began at the same time takes the one that is committed.
    late, bank_of["templates"] = LateStore(tmp_path), ["{object} that is {attribute}"]
    np.testing.assert_array_equal(ensure_bank(late, encoder, data, **bank_of), one)
    with pytest.raises(DataError, match="pairs; delete it"):
        read_bank(store, scorer_digest=SCORER, num_pairs=3)
    store.replace(bank_key(SCORER), b"no")
    with pytest.raises(DataError, match="damaged"):
        read_bank(store, scorer_digest=SCORER, num_pairs=len(one))
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        encode_bank(encoder, data, TEMPLATES, stop=stop)


def job_for(config: Path, model: Model, scores: Path, **more: Any) -> ScoringJob:
    data = opened(config)
    scoring = model.section(templates=TEMPLATES, **more)
    return ScoringJob(
        scoring=scoring,
        dataset=data.url,
        scores=str(scores),
        cache=str(data.cache),
        identity=identify(model.load(), data, scoring),
        device="cpu",
        temperature=0.01,
    )


SETTINGS = ScoreSettings(8, 1, 1, "fp32", "cpu", False, 0.01)


def test_a_worker_with_other_weights_refuses(dataset: Path, tiny: Model, tmp_path: Path) -> None:
    job = job_for(dataset, tiny, tmp_path)
    with pytest.raises(DataError, match="differ between nodes") as error:
        ShardScorer(replace(job, identity=replace(job.identity, weights_digest="other")))
    assert job.identity.digest in str(error.value)


def test_stopping_commits_nothing(dataset: Path, tiny: Model, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    scorer = ShardScorer(job_for(dataset, tiny, tmp_path, cpus_per_actor=threads + 1))
    scorer.prepare_text(replace(SETTINGS, threads=threads + 1))
    scorer.stop.set()
    with pytest.raises(Stopped):
        scorer.score("train", 0, SETTINGS)
    scorer.close()
    assert torch.get_num_threads() == threads
    assert open_store(str(tmp_path)).list_keys("train/") == []


def test_two_shards_under_way_and_one_done_already(
    dataset: Path, tiny: Model, tmp_path: Path
) -> None:
    job = job_for(dataset, tiny, tmp_path / "together")
    alone = ShardScorer(replace(job, scores=str(tmp_path / "alone")))
    for shard in range(3):
        alone.score("train", shard, SETTINGS)
    alone.close()
    scorer = ShardScorer(job)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda shard: scorer.score("train", shard, SETTINGS), range(3)))
    assert all(one.created and one.images == one.samples and one.quality.pairs for one in found)
    again = scorer.score("train", 1, SETTINGS)
    assert not again.created and again.images == 0
    np.testing.assert_array_equal(again.quality.similarity, found[1].quality.similarity)
    scorer.close()
    keys = open_store(job.scores).list_keys("train/")
    assert len(keys) == 3
    for key in keys:
        assert open_store(job.scores).read(key) == open_store(str(tmp_path / "alone")).read(key)
