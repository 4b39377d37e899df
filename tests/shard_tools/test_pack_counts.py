"""What pack counts: every row of the input once, by what became of it, whatever happened before."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_tools.pack import PackCounts
from shard_tools.shard_writer import ShardReport
from tests.fixtures.tiny_vaw import run, write_small_vaw

ROWS = 3 * (24 + 6 + 8)


def counted(folder: Path, name: str) -> dict[str, int]:
    """A metric of pack's text file by its label `result`."""
    (path,) = folder.glob("vlal-packing-*.prom")
    found = re.findall(rf"^{name}{{.*?(?:result=\"(\w+)\")?}} (\S+)$", path.read_text(), re.M)
    return {result: int(float(value)) for result, value in found}


def photo(side: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cleaned dataset with every kind of bad input; its config, and what becomes of the rows."""
    folder = tmp_path_factory.mktemp("damaged")
    config = write_small_vaw(folder)
    photos = folder / "photos"
    (photos / "train0.jpg").unlink()
    (photos / "train1.jpg").write_bytes(b"<html>404</html>")
    (photos / "train2.jpg").write_bytes((photos / "train3.jpg").read_bytes()[:900])
    (photos / "train3.jpg").write_bytes(photo(400))  # above --pack.max_pixels
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("train4.jpg", (photos / "train4.jpg").read_bytes())
    damaged = bytearray((folder / "images.zip").read_bytes())
    damaged[500] ^= 1  # in the photo: the archive's crc32 tells
    (folder / "images.zip").write_bytes(damaged)
    records = json.loads((folder / "train.json").read_text())
    boxes = {15: [400, 400, 40, 40], 16: [10, 10, 0.5, 20], 17: [0, 0, 50_000, 1]}
    for record in records:
        number = int(record["instance_id"])
        record["instance_bbox"] = boxes.get(number, record["instance_bbox"])
    (folder / "train.json").write_text(json.dumps(records))
    assert run("clean", config, "--clean.min_side", "0") == 0
    return config


def test_the_instances_add_up_to_the_rows_of_the_input(damaged: Path, tmp_path: Path) -> None:
    arguments = ["--paths.dataset", str(tmp_path / "d"), "--pack.max_pixels", "49999"]
    arguments += ["--observability.textfiles", str(tmp_path / "text")]
    arguments += ["--pack.images", f"[{damaged.parent}/images.zip, {damaged.parent}/photos]"]
    assert run("pack", damaged, *arguments) == 65  # complete, with more rejects than allowed
    expected = {
        "written": ROWS - 18, "missing": 3, "bad_image": 12, "bad_box": 3, "other": 0,
    }  # fmt: skip
    found = counted(tmp_path / "text", "vlal_pack_instances_total")
    assert found == expected and sum(found.values()) == ROWS
    reports = len(list((tmp_path / "d").glob("*/parts/*")))
    shards = counted(tmp_path / "text", "vlal_pack_shards_total")
    assert shards == {"written": reports, "skipped": 0} and reports > 3
    tars = sum(tar.stat().st_size for tar in (tmp_path / "d").glob("*/shards/*.tar"))
    assert counted(tmp_path / "text", "vlal_pack_bytes_total") == {"": tars}
    # Once more, from where another run left it.
    gone = sorted((tmp_path / "d/train/parts").iterdir())[0]
    gone.unlink()
    assert run("pack", damaged, *arguments) == 65
    assert counted(tmp_path / "text", "vlal_pack_instances_total") == expected
    shards = counted(tmp_path / "text", "vlal_pack_shards_total")
    assert shards == {"written": 1, "skipped": reports - 1}
    assert counted(tmp_path / "text", "vlal_pack_bytes_total") == {"": tars}


def test_each_finished_shard_updates_the_file(tmp_path: Path) -> None:
    counts = PackCounts(str(tmp_path), root="/d")
    assert sum(counted(tmp_path, "vlal_pack_instances_total").values()) == 0
    for number in range(1, 4):
        reject = {"split": "train", "instance_id": "1", "reason": "of a later version"}
        columns = {"uid": [1, 2]}
        counts.add(ShardReport("s", 1000, "", columns, rejects=[reject], found=number == 1))
        found = counted(tmp_path, "vlal_pack_instances_total")
        assert (found["written"], found["other"]) == (2 * number, number)
        assert counted(tmp_path, "vlal_pack_bytes_total") == {"": 1000 * number}
    assert counted(tmp_path, "vlal_pack_shards_total") == {"written": 2, "skipped": 1}


def test_an_unwritable_folder_does_not_stop_pack(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--paths.dataset", str(tmp_path / "d"), "--pack.max_rejected", "1"]
    arguments += ["--observability.textfiles", str(tmp_path / "file")]
    assert run("pack", damaged, *arguments) == 0
    assert capsys.readouterr().err.count("vlal-packing-") == 1  # not once per shard
    assert (tmp_path / "d/dataset.json").exists()
