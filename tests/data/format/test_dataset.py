"""Opening a split: each file is hashed once, and again only after a change."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.tiny_vaw import run
from vlal_dist.data.format.dataset import open_dataset, open_split, read_labels
from vlal_dist.errors import DataError

OPENED = 3  # shards.parquet, index.arrow, blocks.arrow


@pytest.fixture(scope="module")
def packed(small: Path) -> Path:
    return small / "dataset"


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    """A copy that may be altered."""
    shutil.copytree(packed, tmp_path / "dataset")
    for path in (tmp_path / "dataset").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "dataset"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    found: list[str] = []
    real = hashlib.file_digest

    def counting(file: Any, *arguments: Any) -> Any:
        found.append(Path(file.name).name)
        return real(file, *arguments)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return found


def open_train(root: Path | str, cache: Path) -> int:
    return open_split(open_dataset(str(root), cache=cache), "train").num_samples


def altered(path: Path) -> None:
    """Change one byte in the middle of a file, size kept."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def test_an_unchanged_file_is_hashed_once(root: Path, tmp_path: Path, hashed: list[str]) -> None:
    assert open_train(root, tmp_path / "cache") == 72
    assert sorted(hashed) == ["blocks.arrow", "index.arrow", "shards.parquet"]
    assert open_train(root, tmp_path / "cache") == 72
    assert len(hashed) == OPENED
    names = [path.name for path in (tmp_path / "cache/verified").iterdir()]
    assert len(names) == OPENED and all(len(name) == 64 for name in names)


def replaced(path: Path) -> None:
    """Another file of the same size and times under the name."""
    times = path.stat()
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [altered, replaced])
@pytest.mark.parametrize("name", ["index.arrow", "blocks.arrow", "shards.parquet"])
def test_a_file_changed_after_it_was_verified_is_found(
    root: Path, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    open_train(root, tmp_path / "cache")
    change(root / "train" / name)
    with pytest.raises(DataError, match=f"train/{name}: digest"):
        open_train(root, tmp_path / "cache")


def test_a_note_is_valid_for_one_file_only(root: Path, tmp_path: Path, hashed: list[str]) -> None:
    open_train(root, tmp_path / "cache")
    other = tmp_path / "other"
    shutil.copytree(root, other)
    altered(other / "train/index.arrow")
    with pytest.raises(DataError, match=r"index\.arrow: digest"):
        open_train(other, tmp_path / "cache")
    assert len(hashed) == OPENED + 2  # shards.parquet, index.arrow


@pytest.mark.parametrize("note", [b"", b"{}", b"[]", b"\xff", b"null"])
def test_an_unreadable_note_is_ignored(
    root: Path, tmp_path: Path, hashed: list[str], note: bytes
) -> None:
    open_train(root, tmp_path / "cache")
    for path in (tmp_path / "cache/verified").iterdir():
        path.write_bytes(note)
    open_train(root, tmp_path / "cache")
    assert len(hashed) == 2 * OPENED
    open_train(root, tmp_path / "cache")
    assert len(hashed) == 2 * OPENED


def test_without_a_writable_cache_files_are_hashed_each_time(
    root: Path, tmp_path: Path, hashed: list[str]
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    for times in (1, 2):
        assert open_train(root, tmp_path / "cache") == 72
        assert len(hashed) == times * OPENED


def test_remote_files_are_hashed_on_download_and_when_the_copy_changed(
    moto_s3: S3Server, packed: Path, tmp_path: Path, hashed: list[str]
) -> None:
    url, cache = moto_s3.url(), tmp_path / "cache"
    for path in packed.rglob("*"):
        if path.is_file():
            key = f"{url.rpartition('/')[2]}/{path.relative_to(packed).as_posix()}"
            moto_s3.client().upload_file(str(path), moto_s3.bucket, key)
    assert open_train(url, cache) == open_train(url, cache) == 72
    assert hashed == []  # by `fetch`, in pieces
    dataset = open_dataset(url, cache=cache)
    digest = dataset.manifest["splits"]["train"]["files"]["index.arrow"]
    (cache / digest).touch()
    assert open_train(url, cache) == 72 and hashed == [digest]
    altered(cache / digest)
    with pytest.raises(DataError, match="delete it, and it is fetched again") as error:
        open_train(url, cache)
    assert digest in str(error.value)
    (cache / digest).unlink()
    assert open_train(url, cache) == 72


def test_verify_hashes_files_that_have_a_note(
    root: Path, tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--paths.{name}={tmp_path / name}" for name in ("dataset", "merged", "cache")]
    config = packed.parent / "config.yaml"
    assert run("verify", config, *arguments) == 0
    index = root / "train/index.arrow"
    (note,) = [
        path for path in (tmp_path / "cache/verified").iterdir() if str(index) in path.read_text()
    ]
    altered(index)
    stat = index.stat()
    state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    noted = json.loads(note.read_text())
    note.write_text(json.dumps([noted[0], *state, *noted[1 + len(state) :]]))
    assert run("verify", config, *arguments) == 65
    assert "train/index.arrow: sha256" in capsys.readouterr().err


def test_labels_are_read_by_column(packed: Path, tmp_path: Path) -> None:
    dataset = open_dataset(str(packed), cache=tmp_path)
    whole = read_labels(dataset, "val")
    assert whole.column_names == ["key", "instance_id", "positive", "negative"]
    assert read_labels(dataset, "val", columns=["positive"]).equals(whole.select(["positive"]))
