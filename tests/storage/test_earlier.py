"""--replace: own files go, all others stay; what a kill leaves is repaired by the same command."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from tests.storage.test_store import opened
from vlal_dist.storage.earlier import Owned, forget_replacing, remove_earlier
from vlal_dist.storage.store import Store, open_store

OWNED = Owned(r"(first|last)\.json|[a-z]+/parts/[0-9]+", first="first.json", last="last.json")
LISTING = Owned(r"last\.json|[a-z]+\.parquet", last="last.json")
WRITTEN = ("first.json", "train/parts/1", "train/parts/2", "last.json")
IMAGES = {"train": 6, "val": 2, "test": 2}


def fill(store: Store, *keys: str) -> None:
    for key in keys:
        store.create(key, key.encode())


@pytest.fixture(params=["local", "moto_s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    yield from opened(request, tmp_path)


def test_own_files_go_and_others_stay_and_are_named(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, *WRITTEN, "notes.txt", "train/parts/mine", "pack.result.json")
    remove_earlier(store, OWNED, program="pack", inputs={"a": [1]})
    left = ["notes.txt", "pack.replacing.json", "pack.result.json", "train/parts/mine"]
    assert store.list_keys() == left
    assert "left as they are: notes.txt, train/parts/mine (pack does not write" in caplog.text
    forget_replacing(store, program="pack")
    assert "pack.replacing.json" not in store.list_keys()


def test_what_no_file_proves_to_be_the_programs_stays(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, "train.parquet", "notes.parquet")
    for _ in range(2):  # a second call does not take the first one's mark for a proof
        remove_earlier(store, LISTING, program="clean", inputs={})
        assert store.list_keys() == ["notes.parquet", "train.parquet"]
    assert "nothing shows that clean wrote them" in caplog.text
    files = {"files": {"train.parquet": "", "../outside": "", "absent.parquet": ""}}
    store.create("last.json", json.dumps(files).encode())
    remove_earlier(store, LISTING, program="clean", inputs={})
    assert store.list_keys() == ["notes.parquet"]


def test_an_interrupted_call_is_continued_with_equal_inputs_alone(store: Store) -> None:
    fill(store, *WRITTEN)
    remove_earlier(store, OWNED, program="pack", inputs={"a": 1})
    fill(store, "first.json", "train/parts/1")  # killed here
    remove_earlier(store, OWNED, program="pack", inputs={"a": 1})
    assert "train/parts/1" in store.list_keys()
    remove_earlier(store, OWNED, program="pack", inputs={"a": 2})
    assert store.list_keys() == ["pack.replacing.json"]
    fill(store, *WRITTEN)  # finished: the flag is there to write it again
    remove_earlier(store, OWNED, program="pack", inputs={"a": 2})
    assert store.list_keys() == ["pack.replacing.json"]


@pytest.mark.parametrize("owned", [OWNED, LISTING], ids=["first", "listed"])
@pytest.mark.parametrize("after", range(5))
def test_killed_after_any_removal_the_same_call_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owned: Owned, after: int
) -> None:
    store = open_store(str(tmp_path))
    names = WRITTEN if owned is OWNED else ("a.parquet", "b.parquet", "c.parquet")
    fill(store, *names)
    if owned is LISTING:
        store.create("last.json", json.dumps({"files": dict.fromkeys(names, "")}).encode())
    kind, delete, calls = type(store), type(store).delete, []

    def killed(self: Store, key: str) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(key)
        delete(self, key)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(kind, "delete", killed)
        try:
            remove_earlier(store, owned, program="pack", inputs={})
        except KeyboardInterrupt:
            assert len(calls) == after
    remove_earlier(store, owned, program="pack", inputs={})
    assert store.list_keys() == ["pack.replacing.json"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "parts").mkdir(parents=True)
    for name in ("parts/1", "one"):
        (outside / name).write_text("kept")
    store = open_store(str(tmp_path / "root"))
    fill(store, *WRITTEN)
    (tmp_path / "root/val").symlink_to(outside)
    (tmp_path / "root/train/parts/3").symlink_to(outside / "one")
    remove_earlier(store, OWNED, program="pack", inputs={})
    assert (outside / "parts/1").exists() and (outside / "one").exists()
    assert (tmp_path / "root/val").is_symlink()
    assert not (tmp_path / "root/train").exists()  # empty


def change(config: Path, section: str, **keys: object) -> None:
    values = yaml.safe_load(config.read_text())
    values.setdefault(section, {}).update(keys)
    config.write_text(yaml.safe_dump(values))


def contents(root: Path) -> dict[str, bytes]:
    """All files but records of runs, and what a kill left of an unfinished one."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not path.name.endswith((".result.json", ".config.yaml"))
        and not path.name.startswith(".vlal-tmp-")
    }


def test_corrected_settings_are_written_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_small_vaw(tmp_path / "a", images=IMAGES)
    run_all(config, ["clean", "pack"])
    change(config, "clean", min_side=40)
    for stage in ("clean", "pack"):
        assert run(stage, config) == 65
        assert f"--replace: what {stage} wrote there is removed first" in capsys.readouterr().err
        assert run(stage, config, "--replace") == 0
    other = write_small_vaw(tmp_path / "b", images=IMAGES)
    change(other, "clean", min_side=40)
    run_all(other, ["clean", "pack"])
    for root in ("instances", "dataset"):
        assert contents(tmp_path / "a" / root) == contents(tmp_path / "b" / root)


def test_wrong_settings_remove_nothing(tmp_path: Path) -> None:
    config = write_small_vaw(tmp_path, images=IMAGES)
    run_all(config, ["clean", "pack"])
    before = contents(tmp_path / "dataset"), contents(tmp_path / "instances")
    assert run("pack", config, "--replace", "--pack.images", str(tmp_path / "absent")) != 0
    change(config, "clean", deleted_attributes=["nothing"])
    assert run("clean", config, "--replace") == 64
    assert (contents(tmp_path / "dataset"), contents(tmp_path / "instances")) == before


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.15, 0.4])
def test_a_killed_pack_is_repaired_by_the_same_command(tmp_path: Path, after_s: float) -> None:
    config = write_small_vaw(tmp_path / "a")
    run_all(config, ["clean", "pack"])
    change(config, "pack", jpeg_quality=80)
    words = ["pack", "--config", str(config), "--replace"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shard_tools", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "removed" in line:
            break
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.stderr.close()
    process.wait()
    assert not (tmp_path / "a/dataset/dataset.json").exists() or process.returncode == 0
    assert run("pack", config, "--replace") == 0
    other = write_small_vaw(tmp_path / "b")
    change(other, "pack", jpeg_quality=80)
    run_all(other, ["clean", "pack"])
    assert contents(tmp_path / "a/dataset") == contents(tmp_path / "b/dataset")
