"""Tars as img2dataset writes them, from import to a trained model, in place: local and in S3.

The rows are 54 made pictures in three colours; the epoch's ledger is compared with an oracle that
reads the index alone.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import S3Server
from tests.fixtures import epoch_oracle
from tests.fixtures.foreign_tars import write_tars
from tests.scoring.conftest import make_tiny_model
from vlal_dist.data.format.dataset import Split, open_dataset, open_split
from vlal_dist.data.hashing import uid_to_hex
from vlal_dist.storage.store import Store, open_store

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
COLUMNS = "{positive: present, negative: absent}"


def vlal(*words: str, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vlal_dist", *words],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, env={**os.environ, **env},
    )  # fmt: skip


def import_tars(root: Path, tars: str, *, env: Mapping[str, str]) -> Path:
    """Import, and a configuration of a small CLIP and model on top, whose path is returned."""
    words = ["--importing.inputs", tars, "--importing.columns", COLUMNS, "--paths.root", str(root)]
    done = vlal("import", "webdataset", *words, env=env)
    assert done.returncode == 0, done.stderr
    clip = make_tiny_model(root.parent / "clip", seed=7)
    words = clip.flags()
    chosen = dict(zip((word.rpartition(".")[2] for word in words[::2]), words[1::2], strict=True))
    values: dict[str, Any] = {
        "base": str(root / "imported/config.yaml"),
        "pack": {"workers": 1, "block_bytes": 8_192},
        "scoring": {**chosen, "use_ray": False, "device": "cpu", "batch_size": 8},
        "data": {"image_size": 64, "epoch_end": "exact"},
        "model": {"depth": 18, "width": 8},
        "training": {"epochs": 2, "batch_size": 8, "threads": 1},
    }
    path = root.parent / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def stages(done: "subprocess.CompletedProcess[str]") -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [line[4:].partition(":")[0] for line in done.stdout.splitlines() if line[:3] == "==="]


def digests(store: Store) -> dict[str, str]:
    return {key: hashlib.sha256(store.read(key)).hexdigest() for key in store.list_keys()}


def check_ledger(root: Path, *, epochs: int) -> None:
    """Compare the ledger at the end of each epoch with what an oracle plans."""
    name = json.loads((root / "dataset/dataset.json").read_text())["name"]
    uids = epoch_oracle.uids(root / "dataset/train", name=name)
    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    ends = {line["epoch"]: line["ledger"] for line in lines if line["kind"] == "train"}
    assert list(ends) == list(range(epochs))
    for epoch, found in ends.items():
        planned = epoch_oracle.planned(uids, [1.0] * len(uids), seed=99, epoch=epoch)
        assert found == epoch_oracle.ledger(planned) and found["count"] == len(uids)


def first_sample(root: Path) -> tuple[Split, int]:
    """The split train and the byte in the middle of its first photo."""
    split = open_split(open_dataset(str(root / "dataset"), cache=root / "cache"), "train")
    at = int(split.index.offset[0]) + int(split.index.jpg_offset[0])
    return split, at + int(split.index.jpg_length[0]) // 2


def check_damage(config: Path, root: Path, store: Store, *, env: Mapping[str, str]) -> None:
    """A changed byte of a photo is found by training and by verify, by tar, sample and check."""
    split, at = first_sample(root)
    key, uid = split.shard_key(0), uid_to_hex(int(split.index.uid[0]))
    data = bytearray(store.read(key))
    data[at] ^= 0x10
    store.delete(key)
    store.create(key, bytes(data))
    done = vlal("train", "--config", str(config), "--paths.run", str(root / "other"), env=env)
    assert done.returncode == 65, done.stderr
    for part in (f"{store.url}/{key}", uid, "crc32"):
        assert part in done.stderr
    done = vlal("verify", "--config", str(config), env=env)
    assert done.returncode == 65, done.stderr
    assert f"{store.url}/{key}" in done.stderr and "sha256" in done.stderr


def test_local_tars_are_trained_on_in_place(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    tars, root = open_store(str(tmp_path / "tars")), tmp_path / "root"
    before = digests(tars)
    config = import_tars(root, str(tmp_path / "tars/*.tar"), env={})
    ran = stages(vlal("run", "--config", str(config), env={}))
    assert ran[:4] == ["clean", "pack", "score", "train"] and "export" in ran
    assert digests(tars) == before and len(before) == 3
    dataset = open_dataset(str(root / "dataset"), cache=root / "cache")
    for split in dataset.splits:
        found = {shard.name: shard.sha256 for shard in open_split(dataset, split).shards}
        assert found.items() <= before.items()
    assert sum(one["samples"] for one in dataset.manifest["splits"].values()) == 60
    assert not list((root / "dataset").rglob("*.tar")) and not (root / "merged").exists()
    check_ledger(root, epochs=2)
    assert stages(vlal("run", "--config", str(config), env={})) == []
    check_damage(config, root, tars, env={})


def test_tars_of_a_bucket_are_trained_on_in_place(tmp_path: Path, ceph_s3: S3Server) -> None:
    write_tars(tmp_path / "tars")
    url, root = ceph_s3.url(), tmp_path / "root"
    for path in (tmp_path / "tars").iterdir():
        open_store(url).create(path.name, path)
    before = digests(open_store(url))
    config = import_tars(root, f"{url}/*.tar", env=ceph_s3.env)
    ran = stages(vlal("run", "--config", str(config), "--to", "train", env=ceph_s3.env))
    assert ran == ["clean", "pack", "score", "train"]
    assert digests(open_store(url)) == before
    check_ledger(root, epochs=2)
    check_damage(config, root, open_store(url), env=ceph_s3.env)
