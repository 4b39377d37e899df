"""One dataset from the same photos in every kind of place: equal bytes, rejects included."""

import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.conftest import S3Server
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from tests.shard_tools.test_pack import tree
from vlal_dist.config.sections import Config
from vlal_dist.data.format.tar import list_members
from vlal_dist.pipeline import pack_inputs
from vlal_dist.storage.store import open_store

IMAGES = {"train": 8, "val": 3, "test": 3}
ACCEPT = ("--pack.max_rejected", "1")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset packed from a folder that lacks a photo and has a damaged one."""
    folder = tmp_path_factory.mktemp("packed")
    config = write_small_vaw(folder, images=IMAGES)
    (folder / "photos/train3.jpg").unlink()
    cut = (folder / "photos/test1.jpg").read_bytes()[:900]
    (folder / "photos/test1.jpg").write_bytes(cut)
    run_all(config, ["clean"])
    assert run("pack", config, *ACCEPT) == 0
    return folder


def write_parquet(path: Path, photos: list[Path]) -> None:
    rows = [{"bytes": photo.read_bytes(), "path": photo.name} for photo in photos]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pa.parquet.write_table(pa.table({"image": pa.array(rows, kind)}), path, row_group_size=4)


KINDS = ("zip", "tar", "parquet", "two parquets", "bucket", "bucket tar", "bucket parquet")


@pytest.mark.parametrize(
    "kind", ["two tars", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_datasets_are_equal(kind: str, packed: Path, tmp_path: Path, moto_s3: S3Server) -> None:
    photos = sorted((packed / "photos").iterdir())
    place, url = tmp_path / "place", moto_s3.url()
    place.mkdir()
    halves = [photos[::2], photos[1::2]] if kind.startswith("two") else [photos]
    for number, some in enumerate(halves):
        if kind == "zip":
            with zipfile.ZipFile(place / "0.zip", "w") as archive:
                for photo in some:
                    archive.write(photo, photo.name)
        elif "tar" in kind:
            with tarfile.open(place / f"{number}.tar", "w") as tar:
                for photo in some:
                    tar.add(photo, photo.name)
        elif "parq" in kind:
            write_parquet(place / f"{number}.parquet", some)
        elif kind == "bucket":
            for photo in some:
                open_store(url).create(photo.name, photo)
    files = list(place.iterdir())
    images = str(files[0]) if files else url
    if kind.startswith("two"):
        images = f"{place}/*{files[0].suffix}"
    elif kind.startswith("bucket ") and files:
        open_store(url).create(f"shards/{files[0].name}", files[0])
        images = f"{url}/shards/*{files[0].suffix}"
    root = tmp_path / "dataset"
    arguments = ("--paths.dataset", str(root), "--pack.images", f"['{images}']", *ACCEPT)
    assert run("pack", packed / "config.yaml", *arguments) == 0
    assert tree(root) == tree(packed / "dataset")


def test_a_tar_more_under_a_pattern_is_a_change(tmp_path: Path) -> None:
    config = Config.model_validate({"pack": {"images": [f"{tmp_path}/*.tar"]}})
    seen = []
    for name in ("a.tar", "b.tar", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
        seen.append(pack_inputs(config, {})["pack.images"])
    assert seen[0] != seen[1] == seen[2]


@pytest.mark.slow
def test_records_without_a_box_pack_whole_photos(tmp_path: Path) -> None:
    boxed = write_small_vaw(tmp_path / "boxed", images=IMAGES)
    whole = write_small_vaw(tmp_path / "whole", images=IMAGES)
    for folder, box in ((boxed.parent, [0, 0, 160, 120]), (whole.parent, None)):
        for split in IMAGES:
            path = folder / f"{split}.json"
            records = json.loads(path.read_text())[::3]  # one of each photo
            path.write_text(json.dumps([one | {"instance_bbox": box} for one in records]))
    for config in (boxed, whole):
        run_all(config, ["clean", "pack", "verify", "inspect"])
    contents = []
    for config in (boxed, whole):
        shards = [path.read_bytes() for path in (config.parent / "dataset").rglob("*.tar")]
        contents.append(
            sorted(
                (name, data[at : at + size])
                for data in shards
                for name, at, size in list_members(data)
            )
        )
    assert contents[0] == contents[1] and len(contents[0]) == 2 * sum(IMAGES.values())
