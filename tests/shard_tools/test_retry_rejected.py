"""`pack --retry-rejected`: restored photos give the bytes of a clean pack, at any interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shard_tools import merge as merging
from shard_tools import pack as packing
from shard_tools import shard_writer
from tests.conftest import S3Server
from tests.fixtures.scored_dataset import copy_merged, write_scores
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from tests.shard_tools.test_pack import tree
from vlal_dist.storage.local import LocalStore
from vlal_dist.storage.store import open_store


def in_this_process(work: Any, tasks: Any, finished: Any = lambda r: None, **_: Any) -> Any:
    """`run_tasks` without worker processes, whose start takes most of the time of such a pack."""
    results = [work(task) for task in tasks]
    for result in results:
        finished(result)
    return results


@pytest.fixture(autouse=True, scope="module")
def _no_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (packing, merging):
            patch.setattr(module, "run_tasks", in_this_process)
        yield


HELD_BACK = ("train3", "train5", "val1")
ACCEPT = ("--pack.max_rejected", "1.0")
RETRY = ("--retry-rejected", *ACCEPT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset packed, scored and merged with all photos."""
    folder = tmp_path_factory.mktemp("whole")
    run_all(write_small_vaw(folder), ["clean", "pack"])
    write_scores(folder)
    run_all(folder / "config.yaml", ["merge"])
    return folder


@pytest.fixture
def lacking(whole: Path, tmp_path: Path) -> Path:
    """Folder of the same, packed without some photos, which lie in `held_back`."""
    folder = copy_merged(whole, tmp_path / "lacking")
    for name in ("dataset", "scores", "merged"):
        shutil.rmtree(folder / name)
    (folder / "held_back").mkdir()
    for name in HELD_BACK:
        (folder / f"photos/{name}.jpg").rename(folder / f"held_back/{name}.jpg")
    (folder / "photos/train5.jpg").write_bytes(b"<html>404</html>")
    assert run("pack", folder / "config.yaml", *ACCEPT) == 0
    return folder


def restore(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(folder / f"held_back/{name}.jpg", folder / f"photos/{name}.jpg")


def counts(folder: Path) -> Any:
    return json.loads((folder / "dataset/pack.result.json").read_text())["counts"]


def test_restored_photos_give_the_bytes_of_a_clean_pack(whole: Path, lacking: Path) -> None:
    before = tree(lacking / "dataset")
    restore(lacking, *HELD_BACK)
    assert run("pack", lacking / "config.yaml", *ACCEPT) == 0
    assert tree(lacking / "dataset") == before  # without the flag finished shards stay
    times = {path: path.stat().st_mtime_ns for path in (lacking / "dataset").rglob("*.tar")}
    assert run("pack", lacking / "config.yaml", *RETRY) == 0
    after = tree(lacking / "dataset")
    assert after == tree(whole / "dataset") != before
    assert (counts(lacking)["restored"], counts(lacking)["rejected"]) == (9, 0)
    # Shards without rejects were not touched.
    kept = [path for path, when in times.items() if path.stat().st_mtime_ns == when]
    assert 0 < len(kept) == len(times) - 3
    assert run("verify", lacking / "config.yaml", "--paths.merged", str(lacking / "none")) == 0


def test_what_is_restored_in_part_is_packed_in_part(whole: Path, lacking: Path) -> None:
    restore(lacking, "train3")
    assert run("pack", lacking / "config.yaml", *RETRY) == 0
    assert (counts(lacking)["restored"], counts(lacking)["rejected"]) == (3, 6)
    clean = lacking / "clean"
    assert run("pack", lacking / "config.yaml", "--paths.dataset", str(clean), *ACCEPT) == 0
    assert tree(clean) == tree(lacking / "dataset")
    restore(lacking, "train5", "val1")
    assert run("pack", lacking / "config.yaml", *RETRY) == 0
    assert tree(lacking / "dataset") == tree(whole / "dataset")


def test_photos_may_be_restored_in_another_place(whole: Path, lacking: Path) -> None:
    (lacking / "photos/train5.jpg").unlink()
    images = f"[{lacking}/photos, {lacking}/held_back]"
    assert run("pack", lacking / "config.yaml", *RETRY, "--pack.images", images) == 0
    assert tree(lacking / "dataset") == tree(whole / "dataset")


def test_rejects_do_not_depend_on_where_the_photos_lie(lacking: Path) -> None:
    (lacking / "photos").rename(lacking / "elsewhere")
    images = f"[{lacking}/elsewhere, {lacking}/none.zip]"
    with zipfile.ZipFile(lacking / "none.zip", "w"):
        pass
    arguments = ("--pack.images", images, "--paths.dataset", str(lacking / "other"), *ACCEPT)
    assert run("pack", lacking / "config.yaml", *arguments) == 0
    assert tree(lacking / "other") == tree(lacking / "dataset")


def test_nothing_restored_changes_nothing(
    lacking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(lacking / "dataset")
    assert run("pack", lacking / "config.yaml", *RETRY) == 0
    assert "none of 9 rejected instances can be packed now: nothing changes" in (
        capsys.readouterr().err
    )
    assert counts(lacking)["restored"] == 0
    assert tree(lacking / "dataset") == before
    # Another reason is renewed: the list of rejects says what is wrong now.
    (lacking / "photos/train5.jpg").unlink()
    assert run("pack", lacking / "config.yaml", *RETRY) == 0
    assert "9 missing" in capsys.readouterr().err


def test_too_many_rejects_say_what_and_what_to_do(
    lacking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", lacking / "config.yaml") == 65
    error = capsys.readouterr().err
    assert "9 of 114 instances rejected (6 missing, such as " in error
    remedy = "correct pack.images or restore the photos, and repeat with --retry-rejected"
    assert f"{remedy}; or raise the limit" in error


class Killed(BaseException):
    """The end of the process, for tests in this one."""


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        pytest.param(RETRY, 4, id="same command"),
        pytest.param(ACCEPT, 4, id="plain pack"),
        pytest.param(RETRY, 1, id="same command, everywhere", marks=pytest.mark.slow),
        pytest.param(ACCEPT, 1, id="plain pack, everywhere", marks=pytest.mark.slow),
    ],
)
def test_stopped_before_any_change_it_is_finished_by_a_repeat(
    whole: Path, lacking: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], step: int
) -> None:
    """Every delete and create (every `step`th) is once the one before which a run ends."""
    left = 0

    def counted(name: str) -> Any:
        original = getattr(LocalStore, name)

        def change(store: LocalStore, *arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return original(store, *arguments)

        return change

    restore(lacking, *HELD_BACK)
    expected, old = tree(whole / "dataset"), lacking / "old"
    shutil.copytree(lacking / "dataset", old)
    outcomes = set()
    for changes in range(0, 100, step):
        shutil.rmtree(lacking / "dataset")
        shutil.copytree(old, lacking / "dataset")
        left = changes
        with monkeypatch.context() as patch:
            for name in ("create", "delete"):
                patch.setattr(LocalStore, name, counted(name))
            try:
                run("pack", lacking / "config.yaml", *RETRY)
            except Killed:
                pass
            else:
                break
        assert run("pack", lacking / "config.yaml", *flags) == 0
        outcomes.add(tree(lacking / "dataset") == expected)
        assert run("pack", lacking / "config.yaml", *RETRY) == 0
        assert tree(lacking / "dataset") == expected
    assert changes > 30 and left >= 0
    assert outcomes == ({True} if flags == RETRY else {True, False})


@pytest.mark.slow
def test_sigkill_at_several_moments(whole: Path, lacking: Path) -> None:
    restore(lacking, *HELD_BACK)
    command = [sys.executable, "-m", "shard_tools", "pack", "--config"]
    command += [str(lacking / "config.yaml"), *RETRY]
    for seconds in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
        process = subprocess.Popen(command, start_new_session=True, stderr=-3, stdout=-3)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run("pack", lacking / "config.yaml", *RETRY) == 0
    assert tree(lacking / "dataset") == tree(whole / "dataset")


def test_a_shard_killed_before_its_report_is_packed_from_the_present_photos(
    whole: Path, lacking: Path
) -> None:
    """Its tar was made from other photos, and no report vouches for it."""
    for path in (lacking / "dataset/train/parts").iterdir():
        path.unlink()
    (lacking / "dataset/dataset.json").unlink()
    for split in ("train", "val"):
        for name in shard_writer.SPLIT_FILES:
            (lacking / "dataset" / split / name).unlink(missing_ok=True)
    restore(lacking, *HELD_BACK)
    assert run("pack", lacking / "config.yaml", *RETRY) == 0
    assert tree(lacking / "dataset") == tree(whole / "dataset")


@pytest.mark.parametrize("split", ["train", "val"])
def test_merge_renews_the_shards_that_changed(
    whole: Path, lacking: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    """Also where the split is copied, not scored."""
    write_scores(lacking)
    config = lacking / "config.yaml"
    assert run("merge", config) == 0
    restore(lacking, *[name for name in HELD_BACK if name.startswith(split)])
    assert run("pack", config, *RETRY) == 0
    (lacking / "scores/scores.json").unlink()  # as vlal score --retry-rejected does
    write_scores(lacking)
    assert run("merge", config) == 65
    assert "repeat with --retry-rejected to merge the shards that have changed" in (
        capsys.readouterr().err
    )
    tars = (lacking / "merged").rglob("*.tar")
    times = {path: path.stat().st_mtime_ns for path in tars}
    assert run("merge", config, "--retry-rejected") == 0
    kept = [path for path, when in times.items() if path.stat().st_mtime_ns == when]
    assert len(kept) == len(times) - (2 if split == "train" else 1)
    clean = lacking / "clean"
    assert run("merge", config, "--paths.merged", str(clean)) == 0
    assert tree(clean) == tree(lacking / "merged")
    assert run("merge", config, "--retry-rejected") == run("merge", config) == 0
    assert run("verify", config) == 0


def test_a_merge_killed_while_it_renews_is_finished(whole: Path, lacking: Path) -> None:
    write_scores(lacking)
    config = lacking / "config.yaml"
    assert run("merge", config) == 0
    restore(lacking, *HELD_BACK)
    assert run("pack", config, *RETRY) == 0
    (lacking / "scores/scores.json").unlink()
    write_scores(lacking)
    (lacking / "merged/dataset.json").unlink()  # killed after its first step
    (lacking / "merged/train/index.arrow").unlink()
    assert run("merge", config) == 65
    assert run("merge", config, "--retry-rejected") == 0
    assert tree(lacking / "merged") == tree(whole / "merged")


@pytest.mark.slow
def test_on_s3(whole: Path, lacking: Path, ceph_s3: S3Server) -> None:
    root = ceph_s3.url()
    arguments = (*RETRY, "--paths.dataset", root)
    command = [sys.executable, "-m", "shard_tools", "pack", "--config"]
    command += [str(lacking / "config.yaml"), *arguments]
    for photos in ((), HELD_BACK):
        restore(lacking, *photos)
        for seconds in (2.0, 3.0, 4.0):
            process = subprocess.Popen(command, start_new_session=True, stderr=-3, stdout=-3)
            time.sleep(seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert subprocess.run(command, check=False).returncode == 0
    store = open_store(root)
    data = [key for key in store.list_keys() if "result" not in key and "config" not in key]
    expected = tree(whole / "dataset")
    assert data == sorted(expected)
    for key in expected:
        assert store.read(key) == (whole / "dataset" / key).read_bytes(), key
