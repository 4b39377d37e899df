"""Import of webdataset's tars: records, rejects, and tars that were damaged on their way."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shard_tools.importers.webdataset import read_webdataset
from tests.conftest import S3Server
from tests.fixtures.foreign_tars import samples, write_tars
from tests.fixtures.mutilate import mutilations
from tests.shard_tools.importers.reading import read_all, reasons
from vlal_dist.data.format.photos import Limits, Photos
from vlal_dist.errors import ConfigError
from vlal_dist.storage.store import open_store

COLUMNS = {"positive": "present", "negative": "absent"}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "tars"
    write_tars(folder, tars=2, count=6)
    return folder


def read(*inputs: object, **settings: Any) -> Any:
    given = {"all": [str(one) for one in inputs]}
    return read_all(read_webdataset, inputs=given, **{"columns": COLUMNS, **settings})


def expected() -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for number in range(2):
        for sample in samples(number, count=6):
            about = json.loads(sample["json"])
            name = f"{number:05d}/{sample['__key__']}.jpg"
            yield name, tuple(about["present"]), tuple(about["absent"])


def test_samples_become_records_in_order(tars: Path) -> None:
    found = read(tars / "*.tar")
    assert not found.rejected
    assert [(r.image_id, r.positive, r.negative) for r in found.records] == list(expected())
    assert all((r.split, r.box, r.object_name) == ("all", None, "") for r in found.records)
    assert [r.line for r in found.records] == [*range(1, 7)] * 2
    assert found.settings == {
        "pack.images": [str(tars / "*.tar")],
        "pack.in_place": True,
        "data.likelihood": "scores",
    }
    photos = Photos(found.settings["pack.images"], Limits("pack.images"))
    for record in found.records:
        assert photos.read(record.image_id)[:2] == b"\xff\xd8"


def test_tars_of_a_bucket_give_the_same_records(tars: Path, moto_s3: S3Server) -> None:
    url = moto_s3.url()
    for path in tars.glob("*.tar"):
        open_store(url).create(path.name, path)
    found = read(f"{url}/*.tar")
    assert found.records == read(tars / "*.tar").records and not found.rejected


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_samples_that_cannot_be_used_are_rejects(tmp_path: Path) -> None:
    def about(**values: Any) -> bytes:
        return json.dumps({"present": ["red"], **values}).encode()

    path = write(
        tmp_path / "odd.tar",
        [
            ("./a/one.JPG", b"j"), ("./a/one.json", about(split="validation", object="cup")),
            ("none.txt", b"t"), ("none.json", about()),
            ("bare.jpg", b"j"),
            ("list.jpg", b"j"), ("list.json", b"[1]"),
            ("deep.jpg", b"j"), ("deep.json", b'{"present":' + b"[" * 5000),
            ("other.jpg", b"j"), ("other.json", b'{"caption": "x"}'),
            ("word.jpg", b"j"), ("word.json", about(present="red")),
            ("two.png", b"p"), ("two.jpg", b"j"), ("two.json", about()),
            ("seg.jpg", b"j"), ("seg.seg.png", b"p"), ("seg.json", about(absent=None)),
            ("twice.jpg", b"j"), ("twice.json", about()), ("twice.json", about()),
            ("apart.jpg", b"j"), ("apart.json", about()),
            ("split.jpg", b"j"), ("split.json", about(split=3)),
            ("apart.cls", b"1"),
            ("nan.jpg", b"j"), ("nan.json", b'{"present": ["red"], "score": NaN}'),
        ],
    )  # fmt: skip
    found = read(path)
    assert [(r.image_id, r.split, r.object_name) for r in found.records] == [
        ("odd/a/one.JPG", "val", "cup"), ("odd/seg.jpg", "all", ""), ("odd/nan.jpg", "all", ""),
    ]  # fmt: skip
    assert ("apart", "not_adjacent") in {(one.id, one.reason) for one in found.rejected}
    assert {one.id: one.reason for one in found.rejected} == {
        "none": "no_photo", "bare": "no_labels", "list": "bad_json", "deep": "bad_json",
        "other": "no_labels", "word": "bad_labels", "two": "no_photo", "twice": "repeated_member",
        "apart": "no_photo", "split": "bad_json",
    }  # fmt: skip


def test_damage_is_a_reject_where_webdataset_ends_quietly(tars: Path, tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    data = bytearray((tars / "00000.tar").read_bytes())
    whole = read(tars / "00000.tar").records
    with tarfile.open(tars / "00000.tar") as archive:
        third = archive.getmembers()[9]
    data[third.offset + 3] ^= 0xFF
    path.write_bytes(data)
    found = read(path)
    assert found.records == whole[:3]
    assert reasons(found) == [(3, "damaged_tar")] and str(path) in found.rejected[0].detail


def test_settings_are_checked(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes((tars / "00000.tar").read_bytes())
    (tmp_path / "x.tar.gz").write_bytes(b"")
    for inputs, settings, text in (
        ([tars / "*.tar", tmp_path / "00000.tar"], {}, "the same names"),
        ([tmp_path / "x.tar.gz"], {}, "is no .tar"),
        ([tars / "*.tar"], {"columns": {"colour": "x"}}, "no meaning of webdataset"),
    ):
        with pytest.raises(ConfigError, match=text):
            read(*inputs, **settings)


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_mutilated_tars_give_records_and_rejects(tars: Path, tmp_path: Path, first: int) -> None:
    data = (tars / "00000.tar").read_bytes()
    # A tar is mostly pixels: damage of the first 40 kB meets headers and json as well.
    for seed in range(first, first + 25):
        path = tmp_path / "00000.tar"
        path.write_bytes(mutilations(data[:40_000], seed) + data[40_000:])
        found = read(path)
        assert len(found.records) <= 12
        for one in found.rejected:
            assert one.file == "00000.tar" and one.reason and len(one.detail) < 1000
