import json
import socket
from pathlib import Path

import pytest

from vlal_dist.observability.prometheus_files import Target


def target(folder: Path, rank: int = 0, run: str = "s3://b/run") -> Target:
    return Target(folder, run=run, role="train", rank=rank)


def test_it_says_where_and_who(tmp_path: Path) -> None:
    one = target(tmp_path / "made", rank=3)
    one.write(host="127.0.0.1", port=9403)
    (found,) = json.loads(one.path.read_text())
    assert found["targets"] == ["127.0.0.1:9403"]
    assert found["labels"] == {
        "run": "s3://b/run", "role": "train", "rank": "3", "node": socket.gethostname(),
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "made").iterdir()] == [one.path.name]
    one.remove()
    one.remove()  # a sweep of somebody else came first
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    ("host", "announced"),
    [
        ("10.0.0.7", "10.0.0.7:1"),
        ("0.0.0.0", f"{socket.gethostname()}:1"),
        ("::", f"{socket.gethostname()}:1"),
        ("fd00::7", "[fd00::7]:1"),
    ],
)
def test_what_is_announced_can_be_reached(tmp_path: Path, host: str, announced: str) -> None:
    one = target(tmp_path)
    one.write(host=host, port=1)
    assert json.loads(one.path.read_text())[0]["targets"] == [announced]


def test_runs_with_names_alike_have_files_of_their_own(tmp_path: Path) -> None:
    names = {target(tmp_path, run=run).path for run in ("/a/b", "/a-b", "/a/b/", "s3://a/b")}
    assert len(names) == 4


def test_a_start_on_fewer_ranks_removes_what_more_left(tmp_path: Path) -> None:
    before = [target(tmp_path, rank=rank) for rank in (0, 1, 2, 10)]
    other = target(tmp_path, rank=7, run="s3://b/run2")
    for one in (*before, other):
        one.write(host="127.0.0.1", port=1)
    target(tmp_path).remove_others(world_size=2)
    assert set(tmp_path.iterdir()) == {before[0].path, before[1].path, other.path}


def test_a_folder_that_cannot_be_written_is_only_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    one = target(tmp_path / "file" / "below")
    one.write(host="127.0.0.1", port=1)
    one.remove_others(world_size=1)
    one.remove()
    assert "set observability.targets" in caplog.text
