"""Resharding: the same samples in other tars, whatever the sizes, interruptions and stores."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard_tools import reshard as module
from shard_tools.__main__ import main
from shard_tools.reshard import cut_runs, read_samples
from tests.conftest import S3Server
from tests.fixtures.fault_proxy import FaultProxy
from tests.fixtures.scored_dataset import write_scores
from tests.fixtures.tiny_vaw import IMAGES, run, run_all, write_small_vaw
from tests.shard_tools.test_pack import tree
from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, open_split, read_labels
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.errors import DataError
from vlal_dist.storage.store import Store, open_store

WHOLE = 10_000_000
"""More bytes than any split of the small dataset has."""


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    run_all(write_small_vaw(folder), ["clean", "pack"])
    write_scores(folder)
    run_all(folder / "config.yaml", ["merge"])
    return folder


@pytest.fixture(scope="module")
def resharded(merged: Path) -> Path:
    """The merged dataset in shards of 20 kB."""
    assert reshard(merged, merged / "resharded", 20_000) == 0
    return merged / "resharded"


def reshard(folder: Path, target: object, shard_bytes: int, *arguments: str) -> int:
    """Run the tool on the roots of `folder`."""
    sizes = (f"--pack.shard_bytes={shard_bytes}", f"--paths.resharded={target}")
    return run("reshard", folder / "config.yaml", *sizes, *arguments)


def opened(root: Path) -> tuple[Dataset, dict[str, Split]]:
    dataset = open_dataset(str(root), cache=root.parent / "cache")
    return dataset, {name: open_split(dataset, name) for name in dataset.splits}


def data_files(root: Path) -> dict[str, str]:
    """What users read of a root -> sha256: not how it came to be."""
    records = ("pack.json", "merge.json", "reshard.json")
    return {
        name: digest
        for name, digest in tree(root).items()
        if name not in records and "/parts/" not in name and ".vlal-tmp-" not in name
    }


def members(root: Path, split: Split) -> list[tuple[str, bytes]]:
    """Name and content of every tar member of a split, by plain tarfile, in order."""
    found = []
    for shard in split.shards:
        with tarfile.open(root / split.name / "shards" / shard.name) as tar:
            for info in tar:
                content = tar.extractfile(info)
                assert content is not None
                found.append((info.name, content.read()))
    return found


def samples(split: Split) -> list[dict[str, Any]]:
    reader = SampleReader(split)
    found = [dict(vars(reader.read(row))) for row in range(split.num_samples)]
    for one in found:
        if one["log_likelihood"] is not None:
            one["log_likelihood"] = one["log_likelihood"].tobytes()
    return found


@pytest.mark.parametrize("shard_bytes", [1024, 20_000, WHOLE])
def test_samples_keys_labels_uids_and_order_stay(
    merged: Path, tmp_path: Path, shard_bytes: int
) -> None:
    assert reshard(merged, tmp_path / "out", shard_bytes, "--pack.block_bytes=5000") == 0
    before, old = opened(merged / "merged")
    after, new = opened(tmp_path / "out")
    assert list(old) == list(new) == sorted(IMAGES)
    for key in ("name", "crops", "likelihood", "files", "vocabulary_digest", "feasible_digest"):
        assert before.manifest[key] == after.manifest[key]
    for name in old:
        assert members(merged / "merged", old[name]) == members(tmp_path / "out", new[name])
        assert samples(old[name]) == samples(new[name])
        assert read_labels(before, name).equals(read_labels(after, name))
        for column, values in vars(old[name].index).items():
            if column not in ("shard", "offset"):
                assert np.array_equal(values, getattr(new[name].index, column)), column
    assert run("verify", merged / "config.yaml", f"--paths.merged={tmp_path / 'out'}") == 0
    assert run("inspect", merged / "config.yaml", f"--paths.merged={tmp_path / 'out'}") == 0


def test_a_shard_ends_at_the_first_sample_that_reaches_the_size(resharded: Path) -> None:
    for name, split in opened(resharded)[1].items():
        assert [shard.name for shard in split.shards] == [
            f"{name}-{number:06d}.tar" for number in range(len(split.shards))
        ]
        sizes = [split.index.length[split.index.shard == n] for n in range(len(split.shards))]
        assert len(sizes) > 2
        assert all(one.sum() >= 20_000 > one[:-1].sum() for one in sizes[:-1])
        assert sizes[-1].sum() > 0 and sizes[-1][:-1].sum() < 20_000
        assert (split.blocks.bytes[:-1] < 8_192 + split.index.length.max()).all()


def test_pack_and_reshard_write_the_same_bytes_where_they_cut_alike(
    merged: Path, tmp_path: Path
) -> None:
    config, nothing = merged / "config.yaml", f"--paths.merged={tmp_path / 'none'}"
    packed, cut, back = tmp_path / "packed", tmp_path / "cut", tmp_path / "back"
    arguments = (f"--paths.dataset={packed}", f"--pack.shard_bytes={WHOLE}")
    assert run("pack", config, *arguments) == 0
    assert reshard(merged, cut, 20_000, f"--paths.dataset={packed}", nothing) == 0
    assert reshard(merged, back, WHOLE, f"--paths.dataset={cut}", nothing) == 0
    assert len(opened(cut)[1]["train"].shards) > 3
    assert data_files(back) == data_files(packed) != data_files(cut)
    assert opened(back)[0].digest == opened(packed)[0].digest


def test_the_result_depends_on_the_sizes_alone(
    merged: Path, resharded: Path, tmp_path: Path
) -> None:
    again, small, direct = tmp_path / "again", tmp_path / "small", tmp_path / "direct"
    source = f"--paths.merged={resharded}"
    assert reshard(merged, again, 20_000, source, "--pack.workers=2") == 0
    assert data_files(again) == data_files(resharded)
    assert reshard(merged, small, 9_000, source) == 0
    assert reshard(merged, direct, 9_000) == 0
    assert data_files(small) == data_files(direct) != data_files(resharded)
    assert tree(small / "train/parts") == tree(direct / "train/parts")


def test_the_summary_says_which_root_was_read(merged: Path, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    nothing = f"--paths.merged={tmp_path / 'none'}"
    assert reshard(merged, tmp_path / "a", WHOLE, f"--json={counts}") == 0
    found = json.loads(counts.read_text())
    assert found["source"] == str(merged / "merged")
    assert found["samples"] == {"train": 72, "val": 18, "test": 24} and found["shards"] == 3
    assert reshard(merged, tmp_path / "b", WHOLE, f"--json={counts}", nothing) == 0
    assert json.loads(counts.read_text())["source"] == str(merged / "dataset")


def test_killed_in_the_middle_it_continues(merged: Path, tmp_path: Path) -> None:
    target, parts = tmp_path / "killed", tmp_path / "killed/train/parts"
    assert reshard(merged, tmp_path / "whole", 1024) == 0
    command = [sys.executable, "-m", "shard_tools", "reshard", "--config"]
    command += [str(merged / "config.yaml"), f"--paths.resharded={target}"]
    command += ["--pack.shard_bytes=1024", "--pack.workers=1"]
    process = subprocess.Popen(command, start_new_session=True, stderr=-3, stdout=-3)
    deadline = time.monotonic() + 60
    while len(list(parts.glob("[!.]*"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("[!.]*")}
    assert len(finished) < 72 and not (target / "dataset.json").exists()
    assert reshard(merged, target, 1024) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert data_files(target) == data_files(tmp_path / "whole")


def test_again_changes_nothing_and_other_sizes_are_refused(
    merged: Path, resharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(resharded)
    assert reshard(merged, resharded, 20_000) == 0
    assert reshard(merged, resharded, 30_000) == 65
    assert "shard_bytes was 20000, now 30000" in capsys.readouterr().err
    assert reshard(merged, resharded, 20_000, "--pack.block_bytes=9000") == 65
    source = (f"--paths.merged={merged / 'none'}", f"--paths.dataset={merged / 'dataset'}")
    assert reshard(merged, resharded, 20_000, *source) == 65
    assert tree(resharded) == before


@pytest.mark.parametrize("name", ["merged", "merged/", "merged/../merged", "dataset", "resharded"])
def test_a_root_of_another_stage_is_no_target(
    merged: Path, resharded: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = resharded if name == "resharded" else merged / "merged"
    before = data_files(merged / name)
    target = f"{merged}/{name}"
    assert reshard(merged, target, 20_000, f"--paths.merged={source}") == 64
    assert "choose a" in capsys.readouterr().err
    assert data_files(merged / name) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "labels"])
def test_a_damaged_source_is_refused_by_name(
    merged: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "merged"
    shutil.copytree(merged / "merged", root)
    _, splits = opened(root)
    row = 40
    split = splits["train"]
    name = split.shards[int(split.index.shard[row])].name
    expected = SampleReader(split).read(row).key if damage == "flip" else name
    path = root / "train/shards" / name
    if damage == "labels":
        path, expected = root / "train/labels.parquet", "labels.parquet"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[int(split.index.offset[row]) + 600 if damage == "flip" else -1] ^= 1
    path.write_bytes(data[:-512] if damage == "cut" else data)
    if damage == "missing":
        path.unlink()
    assert reshard(merged, tmp_path / "out", 20_000, f"--paths.merged={root}") == 65
    output = capsys.readouterr().err
    assert expected in output and (damage != "flip" or f"sample {expected} (row {row})" in output)
    assert not (tmp_path / "out/dataset.json").exists()


def test_without_any_dataset_it_is_an_error(merged: Path, tmp_path: Path) -> None:
    roots = [f"--paths.{name}={tmp_path / name}" for name in ("dataset", "merged")]
    assert reshard(merged, tmp_path / "out", 20_000, *roots) == 65


def test_a_packed_dataset_is_scored_again_after_it(merged: Path, tmp_path: Path) -> None:
    nothing = f"--paths.merged={tmp_path / 'none'}"
    assert reshard(merged, tmp_path / "dataset", 20_000, nothing) == 0
    write_scores(tmp_path)
    roots = [f"--paths.{name}={tmp_path / name}" for name in ("dataset", "scores", "merged")]
    for stage in ("merge", "verify"):
        assert run(stage, merged / "config.yaml", *roots) == 0
    for name in ("val", "test"):  # without scores, so merge copies their shards and part files
        assert tree(tmp_path / "dataset" / name) == tree(tmp_path / "merged" / name)


@pytest.mark.slow
def test_from_s3_to_s3(
    merged: Path, tmp_path: Path, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    resharded = tmp_path / "resharded"
    assert reshard(merged, resharded, 100_000) == 0
    source, target = open_store(moto_s3.url()), open_store(moto_s3.url())
    local = open_store(str(merged / "merged"))
    for key in local.list_keys():
        source.create(key, local.read(key))
    with FaultProxy(moto_s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        arguments = (f"--paths.merged={source.url}", f"--paths.cache={merged / 's3-cache'}")
        assert reshard(merged, target.url, 100_000, *arguments) == 0
        lines = [seen.line for seen in proxy.log]
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_s3.endpoint)
    for key in data_files(resharded):
        assert target.read(key) == (resharded / key).read_bytes(), key
    cuts = sum(len(split.shards) for root in (resharded, merged / "merged")
               for split in opened(root)[1].values())  # fmt: skip
    reads = [line for line in lines if line.startswith("GET") and ".tar" in line]
    assert len(reads) <= cuts < 114  # samples
    arguments = (f"--paths.merged={target.url}", f"--paths.cache={merged / 's3-cache'}")
    assert run("verify", merged / "config.yaml", *arguments) == 0
    assert reshard(merged, f"{target.url}/", 100_000, f"--paths.merged={target.url}") == 64


def test_runs_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    for count, size in itertools.product((0, 1, 7, 300), (1, 512, 4000, 10**6)):
        length = rng.integers(1, 1000, count).astype(np.uint32)
        expected, first, total = [], 0, 0
        for row, one in enumerate(length.tolist()):
            total += one
            if total >= size or row + 1 == count:
                expected.append((first, row + 1))
                first, total = row + 1, 0
        assert cut_runs(length, size_bytes=size) == expected


class Recorder:
    """A store that counts what is read."""

    def __init__(self, store: Store) -> None:
        self.store, self.reads = store, list[int]()

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        data = self.store.read(key, offset=offset, length=length)
        self.reads.append(len(data))
        return data


def test_samples_are_read_many_at_a_time(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 16_384)
    dataset, splits = opened(merged / "merged")
    recorder = Recorder(splits["train"].store)
    split = replace(splits["train"], store=recorder)  # type: ignore[arg-type]
    reader = SampleReader(splits["train"])
    found = list(read_samples(dataset, split, 5, 70))
    assert found == [(row, reader.read_range(row)) for row in range(5, 70)]
    assert len(recorder.reads) < 65 / 3
    assert max(recorder.reads) < 16_384 + int(split.index.length.max())
    assert sum(recorder.reads) == sum(len(data) for _, data in found)
    broken = replace(split.index, crc32=np.where(np.arange(72) == 9, 1, split.index.crc32))
    with pytest.raises(DataError, match=r"train-000000.tar: sample \d+ \(row 9\): crc32"):
        list(read_samples(dataset, replace(split, index=broken), 5, 70))


def test_reshard_is_listed_among_the_tools(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reshard", "--help"]) == 0
    output = capsys.readouterr().out
    assert "--pack.shard_bytes" in output and "--paths.resharded" in output and "score" in output
    assert main(["--help"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert any(row.startswith("  reshard  ") for row in rows)
