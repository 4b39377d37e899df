"""Quality per shard and summed up: as scikit-learn and the annotations say, at constant memory."""

import hashlib
import json
import pickle
import shutil
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sklearn.metrics import roc_auc_score

from tests.fixtures.scored_dataset import SCORER, TEMPERATURE, write_scores
from vlal_dist.data.format.dataset import Dataset, open_split, read_labels
from vlal_dist.data.format.scores import ShardScores, decode_scores, encode_scores, score_key
from vlal_dist.errors import DataError
from vlal_dist.method.likelihood import log_likelihood
from vlal_dist.remarks import collected_remarks
from vlal_dist.scoring.embed import SplitShard
from vlal_dist.scoring.quality import (
    BINS,
    QualityTotals,
    ShardQuality,
    auc,
    auc_interval,
    check_shard,
    measure_shard,
    type_names,
    warn_near_chance,
)
from vlal_dist.storage.local import LocalStore
from vlal_dist.storage.store import Store, open_store
from vlal_dist.vocabulary import Vocabulary

TYPES = ("color", "material", "other")
SPLITS = ("train", "val")


@pytest.fixture
def scored(dataset: Path, tmp_path: Path) -> Dataset:
    """A dataset of our own with seeded scores of train and val beside it, in `scores`."""
    shutil.copytree(dataset.parent / "dataset", tmp_path / "dataset")
    for path in (tmp_path / "dataset").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    written = write_scores(tmp_path, splits=SPLITS)
    kinds = tuple(TYPES[n % len(TYPES)] for n in range(len(written.vocabulary.attributes)))
    return replace(written, vocabulary=replace(written.vocabulary, attribute_type=kinds))


def scores_of(dataset: Dataset) -> Store:
    return open_store(f"{dataset.url.removesuffix('dataset')}scores")


def key_of(dataset: Dataset, split: str, shard: int) -> str:
    sha256 = open_split(dataset, split).shards[shard].sha256
    return score_key(split, shard_sha256=sha256, scorer_digest=SCORER)


def read(dataset: Dataset, split: str, shard: int) -> ShardScores:
    return decode_scores(scores_of(dataset).read(key_of(dataset, split, shard)), where="test")


def put(dataset: Dataset, split: str, shard: int, scores: ShardScores) -> None:
    """Put another score file in the place of one."""
    key, store = key_of(dataset, split, shard), scores_of(dataset)
    store.delete(key)
    store.create(key, encode_scores(scores))


def check(dataset: Dataset, split: str, shard: int, *, store: Store | None = None) -> ShardQuality:
    quality, quarantined = check_shard(
        dataset,
        SplitShard(open_split(dataset, split), shard),
        store=store or scores_of(dataset),
        manifest=json.loads(scores_of(dataset).read("scores.json")),
        temperature=TEMPERATURE,
        cache=dataset.cache,
    )
    assert quarantined == {}
    return quality


def measure(dataset: Dataset, split: str, shard: int) -> ShardQuality:
    here = SplitShard(open_split(dataset, split), shard)
    return measure_shard(dataset, here, read(dataset, split, shard), temperature=TEMPERATURE)


def assert_same(one: ShardQuality, other: ShardQuality) -> None:
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name))
        assert type(value) is type(getattr(other, name))


def random_shard(rng: np.random.Generator, count: int = 2_000) -> ShardQuality:
    """Positives a little above negatives, by an amount that differs between types."""
    positive, kind = rng.random(count) < 0.4, rng.integers(0, len(TYPES), count).astype(np.uint8)
    mean = 0.2 + positive * np.array([0.05, 0.01, 0.03])[kind]
    return ShardQuality(
        similarity=rng.normal(mean, 0.05).astype(np.float32),
        positive=positive,
        kind=kind,
        entropy=float(rng.random() * 1e3),
        uniform=float(rng.random() * 1e3),
        crops=7,
        pairs=3 * count,
    )


def quantised(shard: ShardQuality) -> ShardQuality:
    """Every similarity in the middle of its bin, where float32 is exact."""
    middle = (np.floor((shard.similarity.astype(np.float64) + 1) * BINS / 2) + 0.5) * 2 / BINS - 1
    return replace(shard, similarity=middle.astype(np.float32))


def totals(shards: Sequence[ShardQuality], types: Sequence[str] = TYPES) -> QualityTotals:
    total = QualityTotals(types)
    for shard in shards:
        total.add(shard)
    return total


def assert_ranking(
    found: Any, shards: Sequence[ShardQuality], kind: int | None, tolerance: float
) -> None:
    of_kind = [one.kind == kind if kind is not None else one.kind >= 0 for one in shards]
    truth = np.concatenate([one.positive[here] for one, here in zip(shards, of_kind, strict=True)])
    score = np.concatenate(
        [one.similarity[here] for one, here in zip(shards, of_kind, strict=True)]
    )
    assert found["auc"] == pytest.approx(roc_auc_score(truth, score), abs=tolerance)
    assert (found["positives"], found["negatives"]) == (truth.sum(), (~truth).sum())


@pytest.mark.parametrize(("change", "tolerance"), [(quantised, 1e-12), (lambda one: one, 1e-3)])
def test_auc_is_scikit_learns_overall_and_per_type(change: Any, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    shards = [change(random_shard(rng)) for _ in range(5)]
    total = totals(shards, types=("other", "material", "color", "other"))
    summary: Any = total.summary()
    assert_ranking(summary, shards, None, tolerance)
    assert list(summary["auc_by_type"]) == list(TYPES)
    for kind, name in enumerate(TYPES):
        assert_ranking(summary["auc_by_type"][name], shards, kind, tolerance)
    for count in ("positives", "negatives"):
        assert sum(one[count] for one in summary["auc_by_type"].values()) == summary[count]
    assert total.pairs == sum(one.pairs for one in shards)
    for name, values in (
        ("entropy_nats", [one.entropy for one in shards]),
        ("uniform_entropy_nats", [one.uniform for one in shards]),
    ):
        assert summary[name] == pytest.approx(sum(values) / (5 * 7), rel=1e-12)
    assert json.loads(json.dumps(summary)) == summary


def test_the_error_is_bounded_by_the_ties() -> None:
    """Coarse bins would show: here all similarities lie within ten of them."""
    rng = np.random.default_rng(1)
    shard = random_shard(rng)
    shard = replace(shard, similarity=(shard.similarity * 1e-3).astype(np.float32))
    bins = np.floor((shard.similarity.astype(np.float64) + 1) * BINS / 2).astype(int)
    ups, downs = bins[shard.positive], bins[~shard.positive]
    bound = 0.5 * (ups[:, None] == downs).mean()
    found: Any = totals([shard]).summary()
    exact = roc_auc_score(shard.positive, shard.similarity)
    assert bound > 1e-3
    assert abs(found["auc"] - exact) <= bound


def test_auc_counts_ties_half_and_needs_both_kinds() -> None:
    def counts(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    assert auc(counts(0, 0, 2), counts(0, 1, 0)) == 1
    assert auc(counts(0, 1, 0), counts(0, 2, 0)) == 0.5
    assert auc(counts(1, 0, 0), counts(0, 5, 0)) == 0
    assert auc(counts(0, 0), counts(1, 0)) is None
    assert auc(counts(1, 0), counts(0, 0)) is None
    # Beyond what products of int64 can hold.
    assert auc(counts(0, 1 << 40), counts(1 << 40, 0)) == 1


def test_no_shards_have_no_quality() -> None:
    none = {"auc": None, "positives": 0, "negatives": 0}
    assert QualityTotals(TYPES).summary() == {
        **none,
        "entropy_nats": None,
        "uniform_entropy_nats": None,
        "auc_by_type": dict.fromkeys(TYPES, none),
    }


def test_rounding_beyond_one_is_counted() -> None:
    ends = np.nextafter(np.float32([-1, 1]), np.float32([-2, 2]))
    shard = ShardQuality(ends, np.array([False, True]), np.zeros(2, np.uint8), 0.0, 0.0, 1, 2)
    summary: Any = totals([shard]).summary()
    assert (summary["auc"], summary["positives"], summary["negatives"]) == (1, 1, 1)


def test_the_order_of_shards_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    shards = [random_shard(rng, 50) for _ in range(40)]
    assert totals(shards).summary() == totals(shards[::-1]).summary()


def test_memory_of_the_driver_is_constant() -> None:
    rng = np.random.default_rng(3)
    total = totals([random_shard(rng) for _ in range(3)])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(300):
            total.add(random_shard(rng))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 65_536  # caches of numpy and Python; 300 shards hold megabytes
    arrays = [value for value in vars(total).values() if isinstance(value, np.ndarray)]
    assert sum(value.nbytes for value in arrays) == len(TYPES) * 2 * BINS * 8
    assert not any(isinstance(value, list | dict | set) for value in vars(total).values())


def expected(dataset: Dataset, split_name: str, shard: int) -> dict[str, Any]:
    """The quality by plain loops over the annotations: sorted pairs, entropies, counts."""
    split, scores = open_split(dataset, split_name), read(dataset, split_name, shard)
    labels = read_labels(dataset, split_name).to_pylist()
    rows = np.flatnonzero(split.index.shard == shard).tolist()
    types = sorted(set(dataset.vocabulary.attribute_type))
    pairs, entropy, uniform, left_out = [], 0.0, 0.0, 0
    for place, row in enumerate(rows):
        here = scores.similarity[scores.indptr[place] : scores.indptr[place + 1]]
        feasible = dataset.feasible.of(int(split.index.object_id[row])).tolist()
        found = dict(zip(feasible, here.tolist(), strict=True))
        for column in ("positive", "negative"):
            for attribute in labels[row][column]:
                if attribute not in found:
                    left_out += 1
                    continue
                kind = types.index(dataset.vocabulary.attribute_type[attribute])
                pairs.append((found[attribute], column == "positive", kind))
        logs = log_likelihood(here, np.array([0, len(here)]), temperature=TEMPERATURE)
        entropy -= float((np.exp(logs.astype(np.float64)) * logs).sum())
        uniform += float(np.log(len(here)))
    return {
        "pairs": sorted(pairs), "entropy": entropy, "uniform": uniform, "crops": len(rows),
        "left_out": left_out, "num_pairs": len(scores.similarity),
    }  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_a_measured_shard_equals_plain_loops_over_the_annotations(
    scored: Dataset, split: str
) -> None:
    left_out = 0
    for shard in range(len(open_split(scored, split).shards)):
        found, wanted = measure(scored, split, shard), expected(scored, split, shard)
        arrays = (found.similarity.tolist(), found.positive.tolist(), found.kind.tolist())
        assert sorted(zip(*arrays, strict=True)) == wanted["pairs"]
        assert found.entropy == pytest.approx(wanted["entropy"], rel=1e-6)
        assert found.uniform == pytest.approx(wanted["uniform"], rel=1e-12)
        assert (found.crops, found.pairs) == (wanted["crops"], wanted["num_pairs"])
        left_out += wanted["left_out"]
        types = (found.similarity.dtype, found.positive.dtype, found.kind.dtype)
        assert types == (np.float32, np.bool_, np.uint8)
        assert len(set(found.kind.tolist())) > 1
        assert_same(found, check(scored, split, shard))
        assert_same(found, pickle.loads(pickle.dumps(found)))
    assert (left_out > 0) == (split == "val")  # train's annotations are feasible by definition


def test_a_file_whose_rows_do_not_fit_is_refused(scored: Dataset) -> None:
    whole = read(scored, "train", 1)
    indptr = whole.indptr.copy()
    indptr[3] += 1  # the same similarities, one given to the neighbour
    put(scored, "train", 1, replace(whole, indptr=indptr))
    with pytest.raises(DataError, match="do not cover exactly the feasible attributes") as error:
        check(scored, "train", 1)
    name = open_split(scored, "train").shards[1].name
    for part in (name, key_of(scored, "train", 1), "delete that file"):
        assert part in str(error.value)
    put(scored, "train", 1, replace(whole, uid=whole.uid[::-1].copy()))
    with pytest.raises(DataError, match="samples that are not"):
        check(scored, "train", 1)
    put(scored, "train", 1, read(scored, "train", 0))
    with pytest.raises(DataError, match="shard_sha256"):
        check(scored, "train", 1)
    scores_of(scored).delete(key_of(scored, "train", 1))
    with pytest.raises(DataError, match="no scores of this shard"):
        check(scored, "train", 1)


class RemoteStore(LocalStore):
    """A folder that pretends to be a bucket, and counts the bytes read of score files."""

    read_bytes = 0

    def local_path(self, key: str) -> Path | None:
        return None

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        data = super().read(key, offset=offset, length=length)
        self.read_bytes += len(data)
        return data


def test_embeddings_are_not_read(scored: Dataset) -> None:
    plain, scores = check(scored, "train", 0), read(scored, "train", 0)
    put(
        scored,
        "train",
        0,
        replace(scores, embedding=np.ones((len(scores.uid), 1 << 14), np.float32)),
    )
    remote = RemoteStore(Path(scores_of(scored).url))
    size = remote.size(key_of(scored, "train", 0))
    assert_same(check(scored, "train", 0, store=remote), plain)
    assert 0 < remote.read_bytes < size / 4


def regroup(dataset: Dataset, split: str, rows: int, *, damage: int | None = None) -> None:
    """Write a split's labels in row groups of some rows; `damage`: a group that is made garbage."""
    path = Path(dataset.url) / split / "labels.parquet"
    pyarrow.parquet.write_table(
        read_labels(dataset, split), path, compression="zstd", row_group_size=rows
    )
    data = bytearray(path.read_bytes())
    if damage is not None:
        group = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(bytes(data))).metadata.row_group(
            damage
        )
        for column in map(group.column, range(group.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            size = column.total_compressed_size
            data[start : start + size] = b"\xff" * size
        path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    dataset.manifest["splits"][split]["files"]["labels.parquet"] = digest


def test_row_groups_do_not_matter(scored: Dataset) -> None:
    shards = range(len(open_split(scored, "train").shards))
    before, labels = [check(scored, "train", n) for n in shards], read_labels(scored, "train")
    regroup(scored, "train", 7)
    columns = ["positive", "negative"]
    for start, stop in [(0, 72), (0, 7), (7, 14), (6, 8), (3, 3), (7, 7), (69, 72), (72, 72)]:
        found = read_labels(scored, "train", columns=columns, rows=range(start, stop))
        assert found.equals(labels.select(columns).slice(start, stop - start)), (start, stop)
    for start, stop in [(0, 73), (-1, 3), (5, 4)]:
        with pytest.raises(DataError, match="has 72 rows"):
            read_labels(scored, "train", columns=columns, rows=range(start, stop))
    for shard, quality in zip(shards, before, strict=True):
        assert_same(check(scored, "train", shard), quality)


def test_other_row_groups_are_not_read(scored: Dataset) -> None:
    labels = read_labels(scored, "train")
    regroup(scored, "train", 10, damage=3)
    for start, stop in [(0, 30), (40, 72), (40, 41), (29, 30)]:
        found = read_labels(scored, "train", columns=["negative"], rows=range(start, stop))
        assert found.equals(labels.select(["negative"]).slice(start, stop - start))
    for start, stop in [(29, 31), (39, 40)]:
        with pytest.raises(DataError, match=r"labels\.parquet is damaged"):
            read_labels(scored, "train", columns=["negative"], rows=range(start, stop))


def test_altered_labels_are_refused(scored: Dataset) -> None:
    path = Path(scored.url) / "train/labels.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train/labels\.parquet: digest"):
        check(scored, "train", 0)


def test_types_beyond_a_byte_are_refused(scored: Dataset) -> None:
    names = tuple(f"zz{n:03d}" for n in range(260))
    old = scored.vocabulary
    more = Vocabulary(
        old.objects,
        old.attributes + names,
        old.attribute_type + names,
        old.prevalence + ("tail",) * len(names),
    )
    assert len(type_names(more)) > 256
    with pytest.raises(DataError, match="attribute types"):
        measure(replace(scored, vocabulary=more), "train", 0)


def summary(value: float | None, positives: int, negatives: int) -> dict[str, Any]:
    return {"auc": value, "positives": positives, "negatives": negatives}


def test_a_model_near_chance_is_remarked() -> None:
    with collected_remarks() as kept:
        warn_near_chance(summary(0.485, 4000, 5000))
    (one,) = kept
    assert "AUC 0.485 (95 % interval 0.473 to 0.497, chance 0.5) over 4000 positive" in one.text
    assert "--method.draw_weights cooccurrence --data.likelihood scores" in one.text


@pytest.mark.parametrize(
    "found",
    [summary(0.55, 4000, 5000), summary(0.3, 49, 5000), summary(0.3, 5000, 0), summary(None, 0, 0)],
)
def test_a_good_model_or_too_few_labels_are_not(found: dict[str, Any]) -> None:
    with collected_remarks() as kept:
        warn_near_chance(found)
    assert kept == []


def test_the_interval_of_an_auc_covers_as_it_says() -> None:
    """Of scores drawn from two normal distributions, whose true AUC is known."""
    rng, covered, repeats = np.random.default_rng(1), 0, 400
    for _ in range(repeats):
        positive, negative = rng.normal(0.1, 1, 120), rng.normal(0, 1, 180)
        labels = np.repeat([1, 0], [120, 180])
        found = float(roc_auc_score(labels, np.concatenate([positive, negative])))
        low, high = auc_interval(found, 120, 180)
        covered += low <= 0.52819 <= high  # Phi(0.1 / sqrt(2))
    assert 0.92 < covered / repeats < 0.98
    assert auc_interval(1.0, 50, 50) == (1.0, 1.0) and auc_interval(0.0, 50, 50) == (0.0, 0.0)
