"""One writer at a time on local roots: real processes, refused, killed, stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlal_dist.errors import StorageError
from vlal_dist.storage import lock
from vlal_dist.storage.lock import descriptors, has_ended, writer_lock

REPOSITORY = Path(__file__).parents[2]
HOLD = """
import subprocess, sys, time
from vlal_dist.storage.lock import descriptors, writer_lock
with writer_lock(sys.argv[1], program="pack"):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(command, pass_fds=descriptors()) if sys.argv[2] == "child" else None
    print(child.pid if child else 0, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "GRACE_S", 0.3)
    monkeypatch.setattr(lock, "LEFT_BEHIND_S", 0.6)


@contextmanager
def holding(root: Path, kind: str = "alone") -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process that holds the lock, and its child, which has it too (0: none)."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root), kind],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def test_the_second_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    with holding(root) as (process, _):
        began = time.monotonic()
        with pytest.raises(StorageError) as error, writer_lock(str(root), program="merge"):
            pass
        assert time.monotonic() - began < 5
        content = json.loads(next(root.glob(".vlal-tmp-lock")).read_text())
        assert content["program"] == "pack" and content["pid"] == process.pid
        for word in (str(root), f"pack (process {process.pid} on {content['host']})",
                     content["since"], f"kill {process.pid}", "Nothing was written"):  # fmt: skip
            assert word in str(error.value)
        assert error.value.exit_code == 74
        with writer_lock(str(root), "evaluation/test-model", program="evaluate"):
            pass  # results with a place of their own


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_blocks_no_one(tmp_path: Path, number: signal.Signals) -> None:
    with holding(tmp_path) as (process, _):
        process.send_signal(number)
        process.wait()
        assert list(tmp_path.iterdir())  # its file is still there
        began = time.monotonic()
        with writer_lock(str(tmp_path), program="pack"):
            assert time.monotonic() - began < 1
        assert list(tmp_path.iterdir()) == []


def test_a_stopped_holder_keeps_it(tmp_path: Path) -> None:
    with holding(tmp_path) as (process, _):
        process.send_signal(signal.SIGSTOP)
        with (
            pytest.raises(StorageError, match="pack"),
            writer_lock(str(tmp_path), program="pack"),
        ):
            pass


def test_children_of_a_killed_holder_keep_it_and_are_named(tmp_path: Path) -> None:
    with holding(tmp_path, "child") as (process, child):
        process.kill()
        process.wait()
        with (
            pytest.raises(StorageError, match=rf"was killed, but .* still write here: {child};"),
            writer_lock(str(tmp_path), program="pack"),
        ):
            pass
        os.kill(child, signal.SIGKILL)
        with writer_lock(str(tmp_path), program="pack"):
            pass


def test_one_that_is_just_ending_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "GRACE_S", 20.0)
    with (
        holding(tmp_path) as (process, _),
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -TERM {process.pid}"]),
        writer_lock(str(tmp_path), program="train"),
    ):
        assert process.wait(5) == -signal.SIGTERM


def test_nothing_is_left_and_unused_folders_are_removed(tmp_path: Path) -> None:
    with writer_lock(str(tmp_path / "a/b"), program="export"):
        assert len(descriptors()) == 1
        assert not os.get_inheritable(descriptors()[0])
    assert list(tmp_path.iterdir()) == [] and descriptors() == ()
    with writer_lock(str(tmp_path / "a/b"), program="export"):
        (tmp_path / "a/b/model.json").write_text("{}")
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["model.json"]


def test_one_after_another_only(tmp_path: Path) -> None:
    """Many at once: no two are ever inside together, though the file comes and goes."""
    code = (
        "import pathlib, sys, time\n"
        "from vlal_dist.storage import lock\n"
        "lock.GRACE_S, lock.POLL_S = 60.0, 0.001\n"
        "inside = pathlib.Path(sys.argv[2])\n"
        "for _ in range(20):\n"
        "    with lock.writer_lock(sys.argv[1], program='pack'):\n"
        "        inside.mkdir()\n"
        "        inside.rmdir()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "root"), str(tmp_path / "inside")]
    processes = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"pid": "x"}', b"\xff\x00", b"{" * 9000])
def test_any_content_is_put_up_with(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".vlal-tmp-lock").write_bytes(content)
    with writer_lock(str(tmp_path), program="pack"):
        pass
    with holding(tmp_path):
        (tmp_path / ".vlal-tmp-lock").write_bytes(content)
        with (
            pytest.raises(StorageError, match="one writer"),
            writer_lock(str(tmp_path), program="x"),
        ):
            pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".vlal-tmp-lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError), writer_lock(str(tmp_path), program="pack"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_only_processes_of_this_machine_are_known_to_have_ended() -> None:
    here = {"pid": os.getpid(), "boot": lock._boot(), "started": lock._started(os.getpid())}
    assert not has_ended(here)
    assert has_ended({**here, "started": "1"})  # the id was given to another process
    assert not has_ended({**here, "started": "1", "boot": "elsewhere"}) and not has_ended({})
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert has_ended({**here, "pid": process.pid})
    for pid in (0, -1, 1 << 80, "1", None):
        assert not has_ended({**here, "pid": pid})
