"""Local folders only: names, durability, permissions, full disks."""

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlal_dist.errors import NotFoundError, StorageError
from vlal_dist.storage.checks import TEMPORARY_PREFIX, translated_errors
from vlal_dist.storage.local import LocalStore


@pytest.fixture
def root(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def files_of(root: LocalStore) -> list[str]:
    return sorted(path.name for path in Path(root.url).rglob("*") if path.is_file())


def test_unfinished_files_are_hidden_and_removed(root: LocalStore, tmp_path: Path) -> None:
    root.create("a/k", b"x")
    (tmp_path / "root" / "a" / f"{TEMPORARY_PREFIX}left-by-a-killed-process").write_bytes(b"half")
    assert root.list_keys() == ["a/k"]
    root.create("a/k2", b"x")
    root.replace("a/k3", b"x")
    assert files_of(root) == [f"{TEMPORARY_PREFIX}left-by-a-killed-process", "k", "k2", "k3"]


def test_a_sweep_removes_what_killed_writers_left_and_nothing_else(
    root: LocalStore, tmp_path: Path
) -> None:
    for key in ("other/k", "swept/k", "swept/a/k"):
        root.create(key, b"x")
    for folder in ("other", "swept", "swept/a", "swept/empty/deeper"):
        (tmp_path / "root" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / folder / f"{TEMPORARY_PREFIX}left").write_bytes(b"half")
    root.sweep("swept")
    assert root.list_keys() == ["other/k", "swept/a/k", "swept/k"]
    assert files_of(root) == [f"{TEMPORARY_PREFIX}left", "k", "k", "k"]
    assert not (tmp_path / "root" / "swept" / "empty").exists()
    root.sweep("nowhere")


def test_a_killed_writer_leaves_no_name(root: LocalStore, tmp_path: Path) -> None:
    """kill -9 in the middle of the copy: no file under the final name, and a repeat succeeds."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = "import sys; from pathlib import Path; from vlal_dist.storage.local import LocalStore\n"
    code += "LocalStore(Path(sys.argv[1])).create('shard', Path(sys.argv[2]))"
    child = subprocess.Popen([sys.executable, "-c", code, root.url, str(pipe)])
    with pipe.open("wb") as writer:
        writer.write(b"x" * (3 << 20))
        writer.flush()
        deadline = time.monotonic() + 30
        while not any(name.startswith(TEMPORARY_PREFIX) for name in files_of(root)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
        child.wait()
    assert root.list_keys() == []
    assert not root.exists("shard")
    assert root.create("shard", b"whole") is True
    assert root.list_keys() == ["shard"]


def test_a_reader_never_sees_half_a_replacement(root: LocalStore) -> None:
    root.replace("status", b"a" * 100_000)
    path = root.local_path("status")
    assert path is not None
    with path.open("rb") as reader:
        root.replace("status", b"b" * 100_000)
        assert reader.read() == b"a" * 100_000


def test_new_files_follow_the_umask(root: LocalStore) -> None:
    old = os.umask(0o027)
    try:
        root.create("k", b"x")
    finally:
        os.umask(old)
    path = root.local_path("k")
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_symbolic_links(root: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"linked")
    root.create("k", b"x")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere" / "file")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "elsewhere")
    assert root.list_keys() == ["k", "link"]
    assert root.read("link") == b"linked"


def test_a_folder_is_no_object(root: LocalStore, tmp_path: Path) -> None:
    root.create("folder/k", b"x")
    with pytest.raises(NotFoundError, match="folder: no such file"):
        root.read("folder")
    with pytest.raises(StorageError, match="folder/k"):
        root.create("folder/k/below", b"x")
    with pytest.raises(StorageError, match="folder"):
        root.create("folder", b"x")
    assert files_of(root) == ["k"]


def test_a_write_that_fails_half_way_leaves_nothing(root: LocalStore) -> None:
    """A real limit of the kernel on the size of files stops the copy after 1 MiB."""
    root.create("before", b"x")
    code = "import resource, signal, sys; from pathlib import Path\n"
    code += "from vlal_dist.storage.local import LocalStore\n"
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    code += "LocalStore(Path(sys.argv[1])).create('shard', b'x' * (2 << 20))"
    done = subprocess.run(
        [sys.executable, "-c", code, root.url], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"StorageError: {root.url}/shard: {os.strerror(errno.EFBIG)}" in done.stderr
    assert files_of(root) == ["before"]


@pytest.mark.parametrize(
    ("code", "kind", "remedy"),
    [
        (errno.ENOSPC, StorageError, "free space"),
        (errno.EDQUOT, StorageError, "quota"),
        (errno.EROFS, StorageError, "read-only"),
        (errno.EPERM, StorageError, "hard links"),
        (errno.EIO, StorageError, "check the file system"),
        (errno.ENOENT, NotFoundError, "check the root and the key"),
    ],
)
def test_system_errors_name_the_file_and_the_remedy(
    code: int, kind: type[StorageError], remedy: str
) -> None:
    path = Path("root/shard")
    expected = pytest.raises(StorageError, match=f"root/shard: .*{remedy}")
    with expected as caught, translated_errors(path):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is kind
    with pytest.raises(StorageError, match=r"^ours$"), translated_errors(path):
        raise StorageError("ours")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_missing_permission_is_named(root: LocalStore) -> None:
    root.create("k", b"x")
    os.chmod(root.url, 0o500)
    try:
        with pytest.raises(StorageError, match="permissions"):
            root.create("other", b"x")
    finally:
        os.chmod(root.url, 0o700)
