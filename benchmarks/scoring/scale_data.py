"""Data of benchmarks/scoring/scale.py: a small scored dataset, one of many shards without tars."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from tests.scoring.conftest import make_tiny_model
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.format.index import (
    INDEX_TYPES,
    Shard,
    encode_blocks,
    encode_index,
    encode_shards,
    form_blocks,
    index_from_columns,
)
from vlal_dist.data.format.scores import score_key
from vlal_dist.data.hashing import mix
from vlal_dist.scoring.identity import ScorerIdentity

SHARD_SAMPLES = 10
IDENTITY = ScorerIdentity("scorer", "", "", (), "", "", "fp32")
SCORER = IDENTITY.digest


def make_small(folder: Path) -> Path:
    """A small packed dataset, scored by the program with a tiny model; returns its folder."""
    made = folder / "small"
    if not (made / "scores/scores.json").exists():
        shutil.rmtree(made, ignore_errors=True)
        config = write_small_vaw(made)
        run_all(config, ["clean", "pack"])
        flags = [*make_tiny_model(made / "model", seed=7).flags(), "--scoring.use_ray", "false"]
        assert run("vlal_dist.score_clip", config, *flags, "--scoring.device", "cpu") == 0
    return made


def make_many(folder: Path, small: Path, shards: int) -> Path:
    """A dataset root whose index lists `shards` shards of `SHARD_SAMPLES` crops; no tars."""
    root = folder / f"many-{shards}"
    if (root / "dataset.json").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    source = small / "dataset"
    ignored = shutil.ignore_patterns("dataset.json", "train", "val", "test")
    shutil.copytree(source, root, ignore=ignored)
    (root / "train").mkdir()
    index = open_split(open_dataset(str(source), cache=small / "cache"), "train").index
    rows = shards * SHARD_SAMPLES
    columns = {name: np.resize(getattr(index, name), rows) for name in INDEX_TYPES}
    columns["shard"] = np.arange(rows) // SHARD_SAMPLES
    columns["uid"] = mix(np.arange(rows, dtype=np.uint64))
    listed = [
        Shard(f"train-{n:06d}.tar", 40_960, hashlib.sha256(b"%d" % n).hexdigest(), SHARD_SAMPLES)
        for n in range(shards)
    ]
    made = index_from_columns(columns)
    written = {
        "shards.parquet": encode_shards(listed),
        "index.arrow": encode_index(made),
        "blocks.arrow": encode_blocks(form_blocks(made, block_bytes=512 << 10)),
    }
    for name, data in written.items():
        (root / "train" / name).write_bytes(data)
    manifest = json.loads((source / "dataset.json").read_text())
    train = manifest["splits"]["train"]
    train["files"] |= {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}
    train.update(samples=rows, shards=shards, bytes=shards * 40_960)
    manifest["splits"] = {"train": train}
    (root / "dataset.json").write_text(json.dumps(manifest))
    return root


def make_scores(folder: Path, root: Path, count: int) -> Path:
    """A score root with empty files of the right names for `count` shards, spread evenly."""
    scores = folder / f"{root.name}-scores-{count}"
    if (scores / "whole").exists():
        return scores
    shutil.rmtree(scores, ignore_errors=True)
    (scores / "train").mkdir(parents=True)
    shards = open_split(open_dataset(str(root), cache=folder / "cache"), "train").shards
    for number in range(count):
        sha256 = shards[number * len(shards) // count].sha256
        (scores / score_key("train", shard_sha256=sha256, scorer_digest=SCORER)).touch()
    (scores / "whole").touch()
    return scores
