"""Damaged shards: strict returns no damaged sample, quarantine leaves out these and no other."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.damaged_tars import (
    KINDS,
    SHARD,
    SPLIT,
    Given,
    all_rows,
    damaged_copy,
    open_loader,
    read_epoch,
    read_ranks,
)
from tests.fixtures.tiny_vaw import run
from vlal_dist.data.format.dataset import Dataset, check_shard_sizes, open_dataset, open_split
from vlal_dist.data.loading.shard_reader import DamagedError
from vlal_dist.data.order.ledger import Ledger
from vlal_dist.errors import DataError, StorageError
from vlal_dist.storage.checks import translated_errors
from vlal_dist.storage.local import LocalStore

LAYOUTS = (1, 2, 3)


@pytest.fixture(scope="module")
def merged(small: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=small / "cache")


@pytest.fixture(scope="module")
def clean(merged: Dataset) -> dict[int, tuple[int, str]]:
    rows = all_rows(read_ranks(merged))
    assert len(rows) == 72
    return rows


def copied(root: Path) -> Dataset:
    return open_dataset(str(root), cache=root / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_strict_stops_before_a_damaged_sample(
    merged: Dataset, clean: dict[int, tuple[int, str]], tmp_path: Path, kind: str
) -> None:
    damaged = damaged_copy(merged, tmp_path / "root", kind)
    assert damaged.resized or damaged.uids, "the corpus has no harmless kind"
    dataset, shard = copied(tmp_path / "root"), str(tmp_path / "root" / damaged.key)
    if damaged.resized:
        with pytest.raises(DataError, match=r"81920 are expected; .*: restore it") as caught:
            check_shard_sizes(open_split(dataset, SPLIT))
        assert shard in str(caught.value)
        check_shard_sizes(open_split(dataset, SPLIT), may_be_damaged=True)  # only warns
    first = min((p for p, (uid, _) in clean.items() if uid in damaged.uids), default=72)
    for world_size in LAYOUTS:
        given = read_ranks(dataset, world_size=world_size)
        found = all_rows(given)
        assert found.items() <= clean.items()
        assert not damaged.uids & {uid for uid, _ in found.values()}
        # Everything before the step of the first damage is returned; on one rank, all of it.
        assert {p for p in clean if p < first // 8 * 8} <= found.keys()
        errors = [one.error for one in given if one.error is not None]
        assert bool(errors) == bool(damaged.uids)
        for error in errors:
            assert isinstance(error, DamagedError) and error.exit_code == 65
            assert error.damage.uid in damaged.uids
            text = str(error)
            assert shard in text and f"{error.damage.uid:016x}" in text
            assert "crc32" in text or "the shard ends before" in text
            assert "restore it" in text and "data.damage quarantine" in text


@pytest.mark.parametrize("kind", KINDS)
def test_quarantine_leaves_out_only_the_damaged_samples_on_every_layout(
    merged: Dataset, clean: dict[int, tuple[int, str]], tmp_path: Path, kind: str
) -> None:
    damaged = damaged_copy(merged, tmp_path / "root", kind)
    dataset = copied(tmp_path / "root")
    whole = {p: row for p, row in clean.items() if row[0] not in damaged.uids}
    for world_size in LAYOUTS:
        given = read_ranks(dataset, world_size=world_size, quarantine=True)
        assert [one.error for one in given] == [None] * world_size
        assert all_rows(given) == whole
        reported = [uid for one in given for uid in one.damaged]
        assert sorted(reported) == sorted(damaged.uids)
        assert sum(one.numbers["damaged"] for one in given) == len(damaged.uids)
        assert all(damaged.key in why for one in given for why in one.damaged.values())
        check_ledger(merged, given, len(damaged.uids))


def check_ledger(dataset: Dataset, given: list[Given], left_out: int) -> None:
    """Trained and left out make up the plan."""
    loader = open_loader(dataset)
    trained = sum((one.trained for one in given), Ledger())
    excluded = sum((one.left_out for one in given), Ledger())
    assert excluded.count == left_out
    assert trained + excluded == loader.plan.ledger(0)
    loader.close()


def test_a_quarantined_sample_is_not_read_again(merged: Dataset, tmp_path: Path) -> None:
    damaged = damaged_copy(merged, tmp_path / "root", "cut_in_member")
    listed, loaders = set[int](), [open_loader(copied(tmp_path / "root"), rank=r, world_size=2,
                                               quarantine=True) for r in range(2)]  # fmt: skip
    for epoch in range(2):
        given = [read_epoch(loader, epoch, quarantined=listed) for loader in loaders]
        assert sum(one.left_out.count for one in given) == len(damaged.uids)
        assert {uid for one in given for uid in one.damaged} == (set() if epoch else damaged.uids)
        listed |= damaged.uids
    assert sum(one.numbers["damaged"] for one in given) == len(damaged.uids)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_every_kind(merged: Dataset, tmp_path: Path, kind: str) -> None:
    """The errors recommend it; it also sees what lies outside of all samples."""
    damaged_copy(merged, tmp_path / "root", kind)
    config = Path(merged.url).parent / "config.yaml"
    places = [f"--paths.merged={tmp_path / 'root'}", f"--paths.run={tmp_path / 'run'}"]
    assert run("verify", config, *places) == 65


class TestTransport:
    """A shard that cannot be read is not damaged: quarantine stops as strict does."""

    @pytest.fixture
    def shard(self, merged: Dataset, tmp_path: Path) -> Path:
        """A shard of a copy at `tmp_path/root`, in which one sample is damaged."""
        return tmp_path / "root" / damaged_copy(merged, tmp_path / "root", "jpg_flip").key

    def stops(self, tmp_path: Path, why: str) -> None:
        (given,) = read_ranks(copied(tmp_path / "root"), quarantine=True)
        assert isinstance(given.error, StorageError) and given.error.exit_code == 74
        assert f"train-{SHARD:06}.tar" in str(given.error) and why in str(given.error)
        assert given.numbers["damaged"] == 0

    def test_a_missing_shard(self, shard: Path, tmp_path: Path) -> None:
        shard.unlink()
        self.stops(tmp_path, "No such file")
        with pytest.raises(DataError, match=f"{shard.name} is missing; restore it"):
            check_shard_sizes(open_split(copied(tmp_path / "root"), SPLIT))

    def test_a_folder_in_its_place(self, shard: Path, tmp_path: Path) -> None:
        shard.unlink()
        shard.mkdir()
        self.stops(tmp_path, "Is a directory")

    @pytest.mark.parametrize("read", [1, 2])
    def test_a_disk_that_fails(
        self, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int
    ) -> None:
        """At the first read of a sample, or at the second one of the damaged sample."""
        error = OSError(errno.EIO, os.strerror(errno.EIO))
        pread, whole = os.pread, LocalStore.read

        def failing_first(descriptor: int, length: int, offset: int) -> bytes:
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(shard):
                raise error
            return pread(descriptor, length, offset)

        def failing_second(store: LocalStore, key: str, **where: Any) -> bytes:
            path = store.local_path(key)
            if path == shard:
                with translated_errors(path):
                    raise error
            return whole(store, key, **where)

        if read == 1:
            monkeypatch.setattr(os, "pread", failing_first)
        else:
            monkeypatch.setattr(LocalStore, "read", failing_second)
        self.stops(tmp_path, "Input/output error")
