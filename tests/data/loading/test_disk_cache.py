"""The disk cache: its limit, its order of eviction, other people's files, kills and full disks."""

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlal_dist.data.loading import disk_cache
from vlal_dist.data.loading.disk_cache import CacheCounts, DiskCache
from vlal_dist.errors import ConfigError, DataError, StorageError

SHARD = hashlib.sha256(b"a shard").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


def block(shard: str, offset: int, length: int) -> bytes:
    """The bytes of a range, so that any process can check them."""
    seed = hashlib.sha256(f"{shard}{offset}".encode()).digest()
    return (seed * (length // len(seed) + 1))[:length]


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "blocks").iterdir())


def used(folder: Path) -> int:
    """Bytes under both folders; files may vanish while this looks."""
    total = 0
    for path in [*(folder / "blocks").iterdir(), *(folder / "writing").iterdir()]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cache_of(folder: Path, limit_bytes: int = 1000, largest_bytes: int = 100) -> DiskCache:
    return DiskCache(folder, limit_bytes=limit_bytes, largest_bytes=largest_bytes)


class TestLaws:
    def test_get_returns_the_bytes_of_put(self, folder: Path) -> None:
        cache = cache_of(folder)
        assert cache.get(SHARD, 5, 10) is None
        cache.put(SHARD, 5, b"0123456789")
        assert cache.get(SHARD, 5, 10) == b"0123456789"
        for shard, offset, length in ((OTHER, 5, 10), (SHARD, 6, 10), (SHARD, 5, 9)):
            assert cache.get(shard, offset, length) is None
        assert cache_of(folder).get(SHARD, 5, 10) == b"0123456789"
        assert cache.counts == CacheCounts(hits=1, misses=4, bytes=10)
        cache.put(SHARD, 5, b"0123456789")
        assert cache.counts.bytes == 10
        cache.discard(SHARD, 5, 10)
        cache.discard(SHARD, 5, 10)
        assert cache.get(SHARD, 5, 10) is None
        assert (cache.counts.bytes, cache.counts.failed_writes) == (0, 0)
        assert entries(folder) == []

    @settings(max_examples=60, deadline=None)
    @given(
        limit=st.integers(50, 300),
        steps=st.lists(
            st.tuples(st.sampled_from(["put", "put", "get", "discard"]), st.integers(0, 12)),
            max_size=60,
        ),
    )
    def test_it_is_least_recently_used_and_never_above_its_limit(
        self, limit: int, steps: list[tuple[str, int]]
    ) -> None:
        """Against a model: the same blocks stay, and the counter is the truth."""
        model: OrderedDict[int, int] = OrderedDict()
        with tempfile.TemporaryDirectory() as name:
            cache = cache_of(Path(name), limit, 50)
            for kind, offset in steps:
                length = 1 + offset * 4
                if kind == "put":
                    cache.put(SHARD, offset, block(SHARD, offset, length))
                    if offset not in model:
                        if sum(model.values()) + length > limit:
                            while sum(model.values()) > min(limit * 90 // 100, limit - length):
                                model.popitem(last=False)
                        model[offset] = length
                elif kind == "get":
                    expected = block(SHARD, offset, length) if offset in model else None
                    assert cache.get(SHARD, offset, length) == expected
                    if offset in model:
                        model.move_to_end(offset)
                else:
                    cache.discard(SHARD, offset, length)
                    model.pop(offset, None)
                kept = {int(path.name.split("-")[1]) for path in entries(Path(name))}
                assert kept == set(model)
                assert used(Path(name)) == sum(model.values()) == cache.counts.bytes <= limit
            assert cache.counts.failed_writes == 0

    def test_an_empty_and_a_too_large_block(self, folder: Path) -> None:
        cache = cache_of(folder, 100, 100)
        cache.put(SHARD, 0, b"")
        assert cache.get(SHARD, 0, 0) == b""
        cache.put(SHARD, 0, b"x" * 101)
        assert cache.get(SHARD, 0, 101) is None
        cache.put(SHARD, 0, b"x" * 100)
        assert cache.get(SHARD, 0, 100) == b"x" * 100
        assert cache.counts.failed_writes == 0

    def test_a_limit_below_one_block_is_refused(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"data\.cache_bytes is 99.* 100 bytes: set"):
            cache_of(folder, 99, 100)
        assert not folder.exists()

    def test_a_lower_limit_holds_from_the_start(self, folder: Path) -> None:
        cache = cache_of(folder, 1000)
        for offset in range(10):
            cache.put(SHARD, offset, bytes(100))
        cache.get(SHARD, 0, 100)
        assert used(folder) == 1000
        smaller = cache_of(folder, 250)
        assert [path.name.split("-")[1] for path in entries(folder)] == ["0", "9"]
        assert smaller.counts == CacheCounts(evictions=8, bytes=200)

    def test_names_that_eviction_would_not_recognise_are_refused(self, folder: Path) -> None:
        cache = cache_of(folder)
        for shard, offset in (("../x", 0), (SHARD[:31], 0), (SHARD.upper(), 0), (SHARD, -1)):
            with pytest.raises(DataError, match="lower-case hex digits"):
                cache.put(shard, offset, b"x")
        assert entries(folder) == []

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StorageError, match=r"file/cache: Not a directory: choose a folder"):
            cache_of(tmp_path / "file" / "cache")


class TestDamage:
    @pytest.mark.parametrize("size_bytes", [0, 9, 11, 5000])
    def test_another_length_is_a_miss(self, folder: Path, size_bytes: int) -> None:
        cache = cache_of(folder)
        cache.put(SHARD, 0, b"0123456789")
        cache.put(OTHER, 0, b"0123456789")
        (path,) = (path for path in entries(folder) if path.name.startswith(SHARD[:32]))
        path.write_bytes(b"x" * size_bytes)
        assert cache.get(SHARD, 0, 10) is None
        assert not path.exists()
        # Too little may be given back, never too much.
        assert cache.counts.bytes >= used(folder) == 10
        cache.put(SHARD, 0, b"0123456789")
        assert cache.get(SHARD, 0, 10) == b"0123456789"

    @pytest.mark.parametrize("content", [b"", b"junk", b"0" * 20, b"\0" * 21])
    def test_a_damaged_counter_is_counted_again(self, folder: Path, content: bytes) -> None:
        cache = cache_of(folder)
        for offset in range(8):
            cache.put(SHARD, offset, bytes(100))
        (folder / ".vlal-block-cache-used").write_bytes(content)
        cache.put(SHARD, 8, bytes(100))
        assert cache.counts.bytes == used(folder) == 900
        assert cache.counts.failed_writes == 0

    def test_too_high_a_counter_is_corrected_before_anything_is_evicted(self, folder: Path) -> None:
        cache = cache_of(folder)
        cache.put(SHARD, 0, bytes(100))
        (folder / ".vlal-block-cache-used").write_bytes(b"%020d\n" % 950)
        cache.put(SHARD, 1, bytes(100))
        assert cache.counts == CacheCounts(bytes=200)

    def test_a_removed_folder_stops_nothing(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = cache_of(folder)
        (folder / "blocks").rmdir()
        for offset in range(5):
            cache.put(SHARD, offset, b"x")
            assert cache.get(SHARD, offset, 1) is None
        assert cache.counts.failed_writes == 5
        assert len(caplog.records) == 1
        assert f"cache {folder}: a block was not written: No such file" in caplog.text


class TestForeignFiles:
    def test_a_dataset_in_the_same_folder_survives(self, folder: Path) -> None:
        keep = {
            "dataset.json": b"{}",
            "train/shards/train-000000.tar": b"t" * 5000,
            "blocks/train-000000.tar": b"b" * 5000,
            f"blocks/{SHARD}": b"c" * 5000,
            f"blocks/{SHARD[:32]}-0-10": b"d" * 5000,
            f"blocks/{SHARD[:32]}-0-10.block.bak": b"e" * 5000,
            f"blocks/x{SHARD[:32]}-0-10.block": b"f" * 5000,
            f"blocks/folder/{SHARD[:32]}-0-10.block": b"g" * 5000,
            f"blocks/{SHARD[:32]}-0-77.block/file": b"h" * 5000,
            "writing/notes.part": b"i",
            f"writing/1-{SHARD}-5.part": b"j",
            f"{SHARD[:32]}-0-10.block": b"k",
        }
        for name, content in keep.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            os.utime(folder / name, (0, 0))
        cache = cache_of(folder)
        for offset in range(50):
            cache.put(OTHER, offset, bytes(100))
        cache.discard(SHARD, 0, 77)
        assert cache.get(SHARD, 0, 77) is None
        assert cache.counts.evictions >= 40
        assert {name: (folder / name).read_bytes() for name in keep} == keep

    def test_a_link_is_neither_followed_nor_removed(self, folder: Path, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.write_bytes(b"0123456789")
        os.utime(precious, (1000, 1000))
        cache = cache_of(folder)
        link = folder / "blocks" / f"{SHARD[:32]}-0-10.block"
        link.symlink_to(precious)
        assert cache.get(SHARD, 0, 10) is None
        cache.put(SHARD, 0, b"x" * 10)
        cache.discard(SHARD, 0, 10)
        for offset in range(1, 50):
            cache.put(SHARD, offset, bytes(100))
        assert link.is_symlink()
        assert precious.read_bytes() == b"0123456789"
        assert precious.stat().st_mtime == 1000

    def test_a_linked_counter_is_not_written_through(self, folder: Path, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.write_bytes(b"0123456789")
        folder.mkdir()
        (folder / ".vlal-block-cache-used").symlink_to(precious)
        cache = cache_of(folder)
        cache.put(SHARD, 0, b"x")
        assert precious.read_bytes() == b"0123456789"
        assert cache.counts.failed_writes == 2
        assert entries(folder) == []


COMMON = f"""
import os, random, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.data.loading.test_disk_cache import SHARD, OTHER, block, cache_of
folder = Path(sys.argv[1])
"""
HAMMER = """
chance = random.Random(int(sys.argv[2]))
cache = cache_of(folder, 200_000, 20_000)
wrong = 0
deadline = time.monotonic() + float(sys.argv[3])
while time.monotonic() < deadline:
    shard, place = chance.choice([SHARD, OTHER]), int(chance.expovariate(0.05))
    length = 1000 + place * 37 % 19_000
    data = cache.get(shard, place, length)
    if data is None:
        cache.put(shard, place, block(shard, place, length))
    elif data != block(shard, place, length):
        wrong += 1
    elif chance.random() < 0.01:
        cache.discard(shard, place, length)
counts = cache.counts
print(wrong, counts.failed_writes, counts.hits, counts.misses, counts.evictions)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMON + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 60
    while not (found := list(path.glob(pattern))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


class TestProcesses:
    def test_ranks_share_a_folder_within_its_limit(self, folder: Path) -> None:
        ranks = [start(HAMMER, folder, seed, 2.0) for seed in range(3)]
        cache = cache_of(folder, 200_000, 20_000)
        most = looks = 0
        while any(rank.poll() is None for rank in ranks):
            with cache._locked():
                most, looks = max(most, used(folder)), looks + 1
            time.sleep(0.002)
        for rank in ranks:
            assert rank.stdout is not None
            wrong, failed, hits, misses, evictions = map(int, rank.stdout.read().split())
            rank.stdout.close()
            assert (rank.returncode, wrong, failed) == (0, 0, 0)
            assert min(hits, misses, evictions) > 10
        assert looks > 100
        assert 150_000 < most <= 200_000
        assert list((folder / "writing").iterdir()) == []
        assert int((folder / ".vlal-block-cache-used").read_bytes()) >= used(folder)

    def test_threads_share_one_object(self, folder: Path) -> None:
        cache = cache_of(folder, 50_000, 2000)

        def use(number: int) -> bool:
            place = number % 60
            data = cache.get(SHARD, place, 1000)
            if data is None:
                cache.put(SHARD, place, block(SHARD, place, 1000))
            return data in (None, block(SHARD, place, 1000))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(use, range(2000)))
        counts = cache.counts
        assert counts.hits + counts.misses == 2000
        assert counts.failed_writes == 0
        assert used(folder) <= 50_000

    def test_killed_writers_leave_whole_entries_only(self, folder: Path) -> None:
        """kill -9 at any time, in a loop of puts."""
        for seed in range(6):
            writer = start(HAMMER, folder, seed, 60.0)
            wait_for(folder, "blocks/*.block")
            time.sleep(0.05 + seed * 0.03)
            writer.kill()
            writer.communicate()
        for path in entries(folder):
            digest, offset, length = path.stem.split("-")
            shard = SHARD if SHARD.startswith(digest) else OTHER
            assert path.read_bytes() == block(shard, int(offset), int(length))
        assert int((folder / ".vlal-block-cache-used").read_bytes()) >= used(folder)
        cache = cache_of(folder, 200_000, 20_000)
        assert list((folder / "writing").iterdir()) == []
        assert cache.counts.bytes == used(folder) <= 200_000

    def test_the_reservation_of_a_killed_writer_is_released(self, folder: Path) -> None:
        code = "os.rename = lambda *_: time.sleep(60)\ncache_of(folder).put(SHARD, 0, bytes(100))"
        writer = start(code, folder)
        part = wait_for(folder, "writing/*.part")
        cache = cache_of(folder)
        assert cache.counts.bytes == 100, "a living writer's room is its own"
        writer.kill()
        writer.communicate()
        assert cache.get(SHARD, 0, 100) is None
        assert cache_of(folder).counts.bytes == 0
        assert not part.exists()

    def test_old_leftovers_are_removed_even_if_their_process_id_is_in_use(
        self, folder: Path
    ) -> None:
        cache_of(folder)
        parts = [folder / "writing" / f"{os.getpid()}-{n * 32}-100.part" for n in "ab"]
        for part in parts:
            part.write_bytes(b"half")
        os.utime(parts[0], (time.time() - 4000,) * 2)
        assert cache_of(folder).counts.bytes == 100
        assert [part.exists() for part in parts] == [False, True]

    def test_no_room_while_others_write(self, folder: Path) -> None:
        cache = cache_of(folder, 100, 100)
        (folder / "writing" / f"{os.getpid()}-{'a' * 32}-60.part").write_bytes(b"")
        (folder / ".vlal-block-cache-used").unlink()
        cache.put(SHARD, 0, bytes(41))
        assert cache.counts == CacheCounts(failed_writes=1, bytes=60)
        cache.put(SHARD, 0, bytes(40))
        assert cache.get(SHARD, 0, 40) == bytes(40)

    def test_a_stopped_process_that_holds_the_lock_stops_no_other(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(disk_cache, "LOCK_WAIT_S", 0.3)
        cache = cache_of(folder)
        cache.put(SHARD, 0, b"x")
        code = "cache = cache_of(folder)\nwith cache._locked():\n"
        code += "    (folder / 'held').touch(); time.sleep(60)"
        holder = start(code, folder)
        wait_for(folder, "held")
        holder.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert cache.get(SHARD, 0, 1) == b"x"
        cache.put(SHARD, 1, b"y")
        cache.discard(SHARD, 0, 1)
        assert cache_of(folder).get(SHARD, 0, 1) is None
        assert time.monotonic() - started < 3.0
        assert cache.counts.failed_writes == 1
        assert "another process holds the cache's lock" in caplog.text
        holder.kill()
        holder.communicate()
        cache.put(SHARD, 1, b"y")
        assert cache.get(SHARD, 1, 1) == b"y"

    def test_a_child_forked_under_the_lock_does_not_keep_it(self, folder: Path) -> None:
        cache = cache_of(folder)
        with cache._locked():
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
        cache.put(SHARD, 0, b"x")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert cache.counts.failed_writes == 0
        with (folder / ".vlal-block-cache-used").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class TestFullDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        """1 MiB of memory as a disk."""
        mount = tmp_path / "disk"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount")
        yield mount
        subprocess.run(["umount", str(mount)], check=True)

    def test_a_full_disk_stops_no_read(self, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = cache_of(disk / "cache", 100 << 20, 1 << 20)
        for offset in range(20):
            cache.put(SHARD, offset, block(SHARD, offset, 100_000))
        kept = [n for n in range(20) if cache.get(SHARD, n, 100_000) is not None]
        assert 5 <= len(kept) <= 10
        assert all(cache.get(SHARD, n, 100_000) == block(SHARD, n, 100_000) for n in kept)
        assert cache.counts.failed_writes == 20 - len(kept)
        assert cache.counts.bytes == used(disk / "cache") == len(kept) * 100_000
        assert len(caplog.records) == 1
        assert "No space left on device; free space" in caplog.text
        for n in kept[:3]:
            cache.discard(SHARD, n, 100_000)
        cache.put(SHARD, 77, bytes(100_000))
        assert cache.get(SHARD, 77, 100_000) == bytes(100_000)

    def test_a_disk_that_fails_at_the_name(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = cache_of(folder)

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "rename", fail)
        cache.put(SHARD, 0, b"x")
        assert cache.counts == CacheCounts(failed_writes=1)
        assert list((folder / "writing").iterdir()) == []
