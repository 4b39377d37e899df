"""Behaviour of every store, on a local folder, on moto and on a real Ceph gateway."""

import hashlib
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import S3Server
from vlal_dist.errors import (
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
    TruncatedError,
)
from vlal_dist.storage import s3, store
from vlal_dist.storage.local import LocalStore
from vlal_dist.storage.s3 import S3Store
from vlal_dist.storage.store import Store, fetch, find_files, open_store

CEPH = pytest.param("ceph_s3", marks=pytest.mark.ceph)


@pytest.fixture(params=["local", "moto_s3", CEPH])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    yield from opened(request, tmp_path)


@pytest.fixture(params=["local", CEPH])
def atomic_root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """As `root`, but not moto: it looks for the name, then writes, without a lock in between."""
    yield from opened(request, tmp_path)


def opened(request: pytest.FixtureRequest, folder: Path) -> Iterator[Store]:
    if request.param == "local":
        yield open_store(str(folder / "root"))
        return
    server = request.getfixturevalue(request.param)
    with server.environment():
        yield open_store(server.url())


class TestRacingWriters:
    @pytest.mark.parametrize("size_bytes", [100, 9 << 20])
    def test_of_racing_creates_one_wins(self, atomic_root: Store, size_bytes: int) -> None:
        bodies = [bytes([n]) * size_bytes for n in range(8)]

        def create(body: bytes) -> bool | None:
            try:
                return atomic_root.create("race", body)
            except ConflictError:
                return None

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, bodies))
        assert sorted(won, key=str) == [None] * 7 + [True]
        assert atomic_root.read("race") == bodies[won.index(True)]
        assert atomic_root.list_keys() == ["race"]

    def test_of_racing_equal_creates_one_wins(self, atomic_root: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda _: atomic_root.create("same", b"s" * 70_000), range(8)))
        assert sorted(won) == [False] * 7 + [True]


class TestStore:
    def test_bytes_come_back_in_any_range(self, root: Store) -> None:
        data = os.urandom(3_000_001)
        assert root.create("a/b.bin", data) is True
        assert root.read("a/b.bin") == data
        assert root.read("a/b.bin", offset=7, length=100) == data[7:107]
        assert root.read("a/b.bin", offset=2_999_990) == data[2_999_990:]
        assert root.read("a/b.bin", offset=5, length=0) == b""
        assert root.read("a/b.bin", offset=len(data)) == b""
        assert root.read("a/b.bin", offset=len(data), length=0) == b""
        assert root.size("a/b.bin") == len(data)
        assert root.exists("a/b.bin")

    def test_an_empty_object_is_an_object(self, root: Store) -> None:
        assert root.create("empty", b"") is True
        assert root.read("empty") == b""
        assert root.size("empty") == 0
        assert root.create("empty", b"") is False

    @pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (11, 0), (11, None)])
    def test_a_range_past_the_end_is_an_error(
        self, root: Store, offset: int, length: int | None
    ) -> None:
        root.create("ten", b"0123456789")
        wanted = rf"'ten' is too short: wanted .* at offset {offset}, but it ends at byte 10"
        with pytest.raises(TruncatedError, match=wanted) as caught:
            root.read("ten", offset=offset, length=length)
        assert caught.value.exit_code == 65

    def test_negative_ranges_are_refused(self, root: Store) -> None:
        root.create("ten", b"0123456789")
        with pytest.raises(DataError, match="offset -1"):
            root.read("ten", offset=-1)
        with pytest.raises(DataError, match="length -2"):
            root.read("ten", length=-2)

    def test_absent_objects(self, root: Store) -> None:
        root.create("there/is", b"x")
        for key in ("nothing", "there", "there/is/not"):
            with pytest.raises(NotFoundError, match=key):
                root.read(key)
            with pytest.raises(NotFoundError, match=key):
                root.size(key)
            assert not root.exists(key)
            root.delete("nothing")

    def test_create_never_overwrites(self, root: Store, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"one")
        assert root.create("k", source) is True
        assert root.create("k", b"one") is False
        assert root.create("k", source) is False
        source.write_bytes(b"two")
        for other in (b"two", source):
            with pytest.raises(ConflictError) as caught:
                root.create("k", other)
            assert hashlib.sha256(b"one").hexdigest() in str(caught.value)
            assert hashlib.sha256(b"two").hexdigest() in str(caught.value)
        assert root.read("k") == b"one"
        assert root.list_keys() == ["k"]

    def test_a_file_is_copied_not_shared(self, root: Store, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"before")
        root.create("k", source)
        with source.open("r+b") as file:
            file.write(b"after!")
        assert root.read("k") == b"before"

    def test_a_missing_source_is_named(self, root: Store, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="no-such-source"):
            root.create("k", tmp_path / "no-such-source")
        assert root.list_keys() == []

    def test_replace_and_delete(self, root: Store) -> None:
        root.replace("status/now.json", b"1")
        root.replace("status/now.json", b"22")
        assert root.read("status/now.json") == b"22"
        root.delete("status/now.json")
        root.delete("status/now.json")
        assert not root.exists("status/now.json")

    def test_listing(self, root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3, "LIST_PAGE", 3)
        keys = ["a/1", "a/2", "a/b/3", "ab", "b c+d%20&é.json", "train/x", "train-1", ".hidden"]
        assert root.list_keys() == []
        for key in keys:
            root.create(key, b"x")
        assert root.list_keys() == sorted(keys)
        assert root.list_keys("a/") == ["a/1", "a/2", "a/b/3"]
        assert root.list_keys("a") == ["a/1", "a/2", "a/b/3", "ab"]
        assert root.list_keys("train") == ["train-1", "train/x"]
        assert root.list_keys("no/such") == []
        assert root.list_keys("ab/") == []
        assert [root.read(key) for key in root.list_keys()] == [b"x"] * len(keys)

    @pytest.mark.parametrize(
        "key",
        ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\0b", ".vlal-tmp-1"],
    )
    def test_unclean_keys_are_refused(self, root: Store, key: str) -> None:
        for use in (root.read, root.size, root.exists, root.delete, root.local_path):
            with pytest.raises(DataError, match="relative key"):
                use(key)
        with pytest.raises(DataError, match="relative key"):
            root.create(key, b"")
        with pytest.raises(DataError, match="relative key"):
            root.replace(key, b"")

    @pytest.mark.parametrize("prefix", ["/", "../", "a/../b", "a//"])
    def test_unclean_prefixes_are_refused(self, root: Store, prefix: str) -> None:
        with pytest.raises(DataError, match="relative key"):
            root.list_keys(prefix)

    def test_survives_pickling_and_forking(self, root: Store) -> None:
        root.create("k", b"shared")
        copy: Store = pickle.loads(pickle.dumps(root))
        assert copy.url == root.url
        assert copy.read("k") == b"shared"
        child = os.fork()
        if child == 0:
            # Nothing of pytest may run in the child.
            os._exit(0 if root.read("k") == b"shared" else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert root.read("k") == b"shared"

    def test_fetch(self, root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "FETCH_BYTES", 1000)
        data = os.urandom(2500)
        digest = hashlib.sha256(data).hexdigest()
        root.create("index.arrow", data)
        cache = tmp_path / "cache"
        path = fetch(root, "index.arrow", cache=cache, sha256=digest)
        assert path.read_bytes() == data
        with pytest.raises(NotFoundError):
            fetch(root, "absent", cache=cache, sha256="0" * 64)
        with pytest.raises(DataError, match="64 hex digits"):
            fetch(root, "index.arrow", cache=cache, sha256="../../x")
        if root.local_path("index.arrow") is not None:
            assert path == root.local_path("index.arrow")
            return
        with pytest.raises(DataError, match=f"has sha256 {digest}, expected {'f' * 64}"):
            fetch(root, "index.arrow", cache=cache, sha256="f" * 64)
        assert [file.name for file in cache.iterdir()] == [digest]
        root.delete("index.arrow")
        assert fetch(root, "index.arrow", cache=cache, sha256=digest) == path


class TestOpenStore:
    def test_paths_and_file_urls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for url in ("my root", f"{tmp_path}/my root", f"file://{tmp_path}/my%20root", "~/my root"):
            opened = open_store(url)
            assert isinstance(opened, LocalStore)
            assert opened.url == f"{tmp_path}/my root"
        assert not (tmp_path / "my root").exists()

    def test_s3_urls(self) -> None:
        opened = open_store("s3://bucket/some/prefix/")
        assert isinstance(opened, S3Store)
        assert opened.url == "s3://bucket/some/prefix"
        assert open_store("s3://bucket").url == "s3://bucket"

    @pytest.mark.parametrize(
        "url",
        ["", "http://host/x", "gs://bucket/x", "s3://", "s3:/bucket/x", "s3:bucket", "s3:///x",
         "s3://bucket/a/../b", "s3://bucket//a", "file://host/x", "file:x", "pipe:cat x"],
    )  # fmt: skip
    def test_anything_else_is_refused(self, url: str) -> None:
        with pytest.raises(ConfigError, match="root "):
            open_store(url)


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_patterns_name_files(kind: str, tmp_path: Path, moto_s3: S3Server) -> None:
    url = str(tmp_path) if kind == "local" else moto_s3.url()
    keys = ["a1.tar", "a2.tar", "b.tar", "a.txt", ".a3.tar", "s/x.tar", "s/t/y.tar", "[odd]*.tar"]
    for key in keys:
        open_store(url).create(key, b"x")

    def found(pattern: str) -> list[str]:
        files = find_files(f"{url}/{pattern}")
        assert all(store.read(key) == b"x" for store, key in files)
        return [f"{store.url}/{key}"[len(open_store(url).url) + 1 :] for store, key in files]

    assert found("a?.tar") == found("a[0-9].tar") == ["a1.tar", "a2.tar"]
    assert found("*.tar") == ["[odd]*.tar", "a1.tar", "a2.tar", "b.tar"]
    assert found("*/*.tar") == found("s/*.tar") == ["s/x.tar"]
    assert found(".a*") == [".a3.tar"] and found("none*") == [] and found("b.tar") == ["b.tar"]
    if kind == "local":
        assert found("[odd]*.tar") == ["[odd]*.tar"]  # a file of that name comes first
