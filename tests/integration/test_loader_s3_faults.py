"""Faults between a real S3 server and the loader: the epoch stays exact, or names its error."""

import errno
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.damaged_tars import (
    KINDS,
    SPLIT,
    Given,
    all_rows,
    damage,
    name_of,
    open_loader,
    open_remote,
    read_epoch,
    read_ranks,
    upload,
)
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.fixtures.wide_matrix import some_of
from vlal_dist.data.format.dataset import Dataset, check_shard_sizes, open_dataset, open_split
from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.loading.shard_reader import DamagedError
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.errors import DataError, NotFoundError, ReplacedError, StorageError
from vlal_dist.storage import s3_client

EXTRA = f"{SPLIT}/shards/{SPLIT}-000004.tar"
SHARDS = f"^GET .*/{SPLIT}/shards/"
Rows = dict[int, tuple[int, str]]


@pytest.fixture(scope="module")
def merged(small: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=small / "cache")


@pytest.fixture(scope="module")
def clean(merged: Dataset) -> Rows:
    return all_rows(read_ranks(merged))


@pytest.fixture(scope="module")
def uploaded(ceph_s3: S3Server, merged: Dataset) -> str:
    """The dataset on Ceph; leave it as it is."""
    with ceph_s3.environment():
        root = ceph_s3.url()
        upload(merged, root)
    return root


@pytest.fixture
def url(ceph_s3: S3Server, merged: Dataset, uploaded: str) -> Iterator[str]:
    """The same, of which a test may alter, add or delete shards."""
    yield uploaded
    client = ceph_s3.client()
    client.delete_object(**name_of(uploaded, EXTRA))
    for path in Path(merged.url, SPLIT, "shards").iterdir():
        place = name_of(uploaded, f"{SPLIT}/shards/{path.name}")
        client.put_object(**place, Body=path.read_bytes())


@pytest.fixture
def proxy(ceph_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before Ceph; every store that is opened from now on goes through it."""
    with FaultProxy(ceph_s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(s3_client, "_FIRST_PAUSE_S", 0.01)
        yield proxy


@pytest.fixture
def remote(uploaded: str, proxy: FaultProxy, tmp_path: Path) -> Dataset:
    """The dataset through the proxy; its reads time out after a second."""
    return open_remote(uploaded, tmp_path)


def block_cache(dataset: Dataset, folder: Path, *, limit_bytes: int = 1 << 20) -> DiskCache:
    largest = ConcatSplits([open_split(dataset, SPLIT)]).largest_block
    return DiskCache(folder, limit_bytes=limit_bytes, largest_bytes=largest)


def hits(proxy: FaultProxy) -> int:
    return sum(seen.fault is not None for seen in proxy.log)


def check_exact(given: list[Given], clean: Rows) -> None:
    """Every sample once, in its place, bit by bit, and none damaged."""
    assert [one.error for one in given] == [None] * len(given)
    assert all_rows(given) == clean
    assert sum(one.numbers["damaged"] for one in given) == 0


class TestHealed:
    @pytest.mark.parametrize(("share", "least"), [(0.1, 2), (0.5, 20)])
    def test_bursts_of_busy_answers(
        self, remote: Dataset, proxy: FaultProxy, clean: Rows, share: float, least: int
    ) -> None:
        proxy.faults = [Fault("busy", SHARDS, times=10**6, chance=share)]
        check_exact(read_ranks(remote, world_size=2), clean)
        assert hits(proxy) >= least

    def test_an_outage_of_some_seconds(
        self, remote: Dataset, proxy: FaultProxy, clean: Rows
    ) -> None:
        loader = open_loader(remote)
        proxy.faults = [Fault("away", SHARDS, seconds=1.5)]
        started = time.monotonic()
        check_exact([read_epoch(loader)], clean)
        assert 1.5 <= time.monotonic() - started < 13.0
        loader.close()

    @pytest.mark.parametrize("kind", ["reset", "truncate", "short", "stall", "flip"])
    def test_broken_bodies(
        self, remote: Dataset, proxy: FaultProxy, clean: Rows, kind: Any
    ) -> None:
        """`truncate`: fewer bytes than the length that the reply states; `short`: as many."""
        proxy.faults = [Fault(kind, SHARDS, times=6, at=1000 * n, seconds=3.0) for n in range(1, 3)]
        given = read_ranks(remote, world_size=2)
        check_exact(given, clean)
        assert hits(proxy) == 12
        # No transport detects a flipped bit: the checksum does, and the sample is read again.
        assert sum(one.numbers["refetched"] for one in given) == (12 if kind == "flip" else 0)

    def test_a_flipped_bit_does_not_stay_in_the_cache(
        self, remote: Dataset, proxy: FaultProxy, clean: Rows, merged: Dataset, tmp_path: Path
    ) -> None:
        proxy.faults = [Fault("flip", SHARDS, times=5, at=1000)]
        cache = block_cache(remote, tmp_path / "blocks")
        check_exact(read_ranks(remote, cache=cache), clean)
        assert hits(proxy) == 5
        shards = {shard.sha256[:32]: shard.name for shard in open_split(remote, SPLIT).shards}
        kept = list((tmp_path / "blocks/blocks").iterdir())
        assert kept
        for path in kept:
            sha256, offset, length = path.stem.split("-")
            shard = Path(merged.url, SPLIT, "shards", shards[sha256]).read_bytes()
            assert path.read_bytes() == shard[int(offset) : int(offset) + int(length)]


class TestManifestAndBucket:
    def test_a_missing_and_an_extra_shard(
        self, ceph_s3: S3Server, url: str, tmp_path: Path, clean: Rows
    ) -> None:
        """A shard that no manifest names is not read; a named one must exist before work begins."""
        client, dataset = ceph_s3.client(), open_remote(url, tmp_path)
        client.put_object(**name_of(url, EXTRA), Body=b"x" * 512)
        split = open_split(dataset, SPLIT)
        check_shard_sizes(split)
        check_exact(read_ranks(dataset), clean)
        client.delete_object(**name_of(url, split.shard_key(2)))
        with pytest.raises(DataError, match=r"train-000002\.tar is missing; restore it"):
            check_shard_sizes(split)

    @pytest.mark.parametrize("quarantine", [False, True])
    def test_a_shard_that_goes_in_mid_run_is_not_damage(
        self, ceph_s3: S3Server, url: str, tmp_path: Path, clean: Rows, quarantine: bool
    ) -> None:
        loader = open_loader(open_remote(url, tmp_path), quarantine=quarantine)
        check_exact([read_epoch(loader)], clean)
        ceph_s3.client().delete_object(**name_of(url, f"{SPLIT}/shards/train-000002.tar"))
        given = read_epoch(loader, 1)
        assert isinstance(given.error, NotFoundError) and "train-000002" in str(given.error)
        assert given.numbers["damaged"] == 0
        loader.close()

    @pytest.mark.parametrize("quarantine", [False, True])
    def test_a_shard_replaced_between_two_reads(
        self, ceph_s3: S3Server, url: str, tmp_path: Path, clean: Rows, quarantine: bool
    ) -> None:
        loader = open_loader(open_remote(url, tmp_path), quarantine=quarantine)
        check_exact([read_epoch(loader)], clean)
        self.replace(ceph_s3, url)
        self.is_refused(read_epoch(loader, 1))
        loader.close()

    def test_a_shard_replaced_within_a_read(
        self, ceph_s3: S3Server, url: str, remote: Dataset, proxy: FaultProxy
    ) -> None:
        """The rest of the body would be of another object."""
        proxy.faults = [
            Fault(
                "truncate",
                f"{SHARDS}train-000002",
                at=1000,
                then=lambda: self.replace(ceph_s3, url),
            )
        ]
        (given,) = read_ranks(remote, quarantine=True)
        self.is_refused(given)

    def replace(self, server: S3Server, url: str) -> None:
        """Another object of the same size, by another writer."""
        client, name = server.client(), name_of(url, f"{SPLIT}/shards/train-000002.tar")
        size_bytes = client.head_object(**name)["ContentLength"]
        client.put_object(**name, Body=os.urandom(size_bytes))

    def is_refused(self, given: Given) -> None:
        assert isinstance(given.error, ReplacedError) and given.error.exit_code == 65
        assert "train-000002" in str(given.error) and "was replaced" in str(given.error)
        assert given.numbers["damaged"] == 0


@pytest.mark.parametrize("kind", some_of(KINDS, 2, 7, 9, 11, 16))
def test_damage_at_rest_is_what_it_is_on_a_local_disk(
    ceph_s3: S3Server, url: str, merged: Dataset, clean: Rows, tmp_path: Path, kind: str
) -> None:
    damaged = damage(merged, kind)
    ceph_s3.client().put_object(**name_of(url, damaged.key), Body=damaged.data)
    dataset = open_remote(url, tmp_path)
    if damaged.resized:
        with pytest.raises(DataError, match=f"{damaged.key}: {len(damaged.data)} bytes where"):
            check_shard_sizes(open_split(dataset, SPLIT))
    given = read_ranks(dataset, world_size=2, quarantine=True)
    assert [one.error for one in given] == [None, None]
    assert all_rows(given) == {p: row for p, row in clean.items() if row[0] not in damaged.uids}
    assert {uid for one in given for uid in one.damaged} == damaged.uids
    (strict,) = read_ranks(dataset)
    assert isinstance(strict.error, DamagedError) == bool(damaged.uids)
    assert strict.rows.items() <= clean.items()
    assert not damaged.uids & {uid for uid, _ in strict.rows.values()}


def test_a_store_that_is_gone_is_not_damage(
    ceph_s3: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "OUTAGE_S", 0.0)
    monkeypatch.setattr(s3_client, "_FIRST_PAUSE_S", 0.01)
    with FaultProxy(ceph_s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        loader = open_loader(open_remote(url, tmp_path), quarantine=True)
    given = read_epoch(loader)
    loader.close()
    assert isinstance(given.error, StorageError) and given.error.exit_code == 74
    assert "no answer from the store" in str(given.error)
    assert given.rows == {} and given.numbers["damaged"] == 0


class TestCache:
    @pytest.fixture
    def small_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A disk of 64 KiB; where none can be mounted, one that takes nothing."""
        mount = tmp_path / "disk"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
        if shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0:
            yield mount
            subprocess.run(["umount", str(mount)], check=True)
            return

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(DiskCache, "_reserve", full)
        yield mount

    def test_a_full_disk(
        self, uploaded: str, ceph_s3: S3Server, tmp_path: Path, clean: Rows, small_disk: Path
    ) -> None:
        dataset = open_remote(uploaded, tmp_path)
        cache = block_cache(dataset, small_disk)
        check_exact(read_ranks(dataset, cache=cache), clean)
        assert cache.counts.failed_writes > 0

    def test_every_cached_file_corrupted(
        self, uploaded: str, ceph_s3: S3Server, tmp_path: Path, clean: Rows
    ) -> None:
        dataset, folder = open_remote(uploaded, tmp_path), tmp_path / "blocks"
        check_exact(read_ranks(dataset, cache=block_cache(dataset, folder)), clean)
        files = sorted((folder / "blocks").iterdir())
        for path in files:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        again = read_ranks(dataset, cache=block_cache(dataset, folder))
        check_exact(again, clean)
        assert again[0].numbers["refetched"] == len(files) and not any(
            path.exists() for path in files
        )
        healed = read_ranks(dataset, cache=block_cache(dataset, folder))
        check_exact(healed, clean)
        assert healed[0].numbers["refetched"] == 0
        assert sorted((folder / "blocks").iterdir()) == files

    @pytest.mark.slow
    def test_two_ranks_share_a_cache_that_is_too_small(
        self, uploaded: str, proxy: FaultProxy, tmp_path: Path, clean: Rows
    ) -> None:
        """Evictions, flipped bits and two processes at once; none waits for the other for ever.

        Byte 5000 lies in block ranges, not in single samples: second reads arrive whole.
        """
        proxy.faults = [Fault("flip", SHARDS, times=10**6, at=5000, chance=0.2)]
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            ranks = [pool.submit(read_as_rank, rank, uploaded, tmp_path) for rank in range(2)]
            epochs = zip(*(rank.result(timeout=120) for rank in ranks), strict=True)
            first, *later = epochs
        check_exact(list(first), clean)
        expected = [sorted(uid for uid, _ in clean.values())] * len(later)
        assert [sorted(uid for uid, _ in all_rows(both).values()) for both in later] == expected
        assert sum(one.numbers["damaged"] for both in later for one in both) == 0
        assert sum(one.numbers["refetched"] for one in later[-1]) > 0
        assert sum(one.numbers["cache_evictions"] for one in later[-1]) > 0
        assert sum(one.numbers["cache_hits"] for one in later[-1]) > 0
        stored = [path.stat().st_size for path in (tmp_path / "blocks/blocks").iterdir()]
        assert sum(stored) <= LIMIT_BYTES


LIMIT_BYTES = 150_000


def read_as_rank(rank: int, url: str, folder: Path) -> list[Given]:
    """Three epochs of one of two ranks; runs in a process of its own."""
    dataset = open_remote(url, folder / str(rank))
    cache = block_cache(dataset, folder / "blocks", limit_bytes=LIMIT_BYTES)
    loader = open_loader(dataset, rank=rank, world_size=2, cache=cache)
    given = [read_epoch(loader, epoch) for epoch in range(3)]
    loader.close()
    return given
