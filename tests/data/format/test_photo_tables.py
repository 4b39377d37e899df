"""Photos in tables: names of rows, columns, row groups; equal to a folder of the same files."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import S3Server
from tests.fixtures.mutilate import mutilations
from vlal_dist.data.format import photo_tables
from vlal_dist.data.format.photo_tables import row_names
from vlal_dist.data.format.photos import Limits, MissingPhotoError, Photos
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.storage.store import open_store

HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS = [
    {"bytes": b"one", "path": "a.jpg"},
    {"bytes": b"two", "path": None},
    {"bytes": None, "path": "absent.jpg"},
    None,
    {"bytes": b"five", "path": "b.png"},
]
READ = {"a": b"one", "a.jpg": b"one", "t-00000001": b"two", "b.png": b"five", "t/b": b"five"}


def photos(*places: object, **limits: Any) -> Photos:
    return Photos([str(place) for place in places], Limits("pack.images", **limits))


def write_parquet(path: Path, columns: Mapping[str, pa.Array], *, group: int = 2) -> Path:
    pa.parquet.write_table(pa.table(dict(columns)), path, row_group_size=group)
    return path


def write_arrow(path: Path, columns: Mapping[str, pa.Array], *, stream: bool) -> Path:
    table = pa.table(dict(columns))
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)
    return path


@pytest.fixture(params=["parquet", "arrow file", "arrow stream", "bucket", "no suffix"])
def place(request: pytest.FixtureRequest, tmp_path: Path, moto_s3: S3Server) -> str:
    columns = {"image": pa.array(ROWS, HUGGING_FACE), "label": pa.array(range(5))}
    if request.param.startswith("arrow"):
        stream = request.param == "arrow stream"
        return str(write_arrow(tmp_path / "t.arrow", columns, stream=stream))
    path = write_parquet(tmp_path / "t.parquet", columns)
    if request.param == "no suffix":
        return str(path.rename(tmp_path / "t"))
    if request.param == "parquet":
        return str(path)
    open_store(url := moto_s3.url()).create("data/t.parquet", path)
    return f"{url}/data/t.parquet"


def test_rows_are_photos(place: str) -> None:
    reader = photos(place)
    for name, data in READ.items():
        assert reader.read(name) == data
    for name, row in {"absent.jpg": 2, "t-00000003": 3}.items():
        with pytest.raises(MissingPhotoError, match=rf"^missing: row {row} of .* no bytes in the"):
            reader.read(name)
    with pytest.raises(MissingPhotoError, match=r"^missing: no such photo"):
        reader.read("t-00000000")
    assert reader.list_names() == [
        "t/a.jpg", "t/absent.jpg", "t/b.png", "t/t-00000001", "t/t-00000003"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"^left out: not a photo"):
        reader.read("t/t-00000001")  # of the listing: by content


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"x", b"y", None], pa.binary()),
        pa.array([b"x", b"y", None], pa.large_binary()),
        pa.array([b"x", b"y", None], pa.binary()).dictionary_encode(),
        pa.StructArray.from_arrays([pa.array([b"x", b"y", None], pa.large_binary())], ["bytes"]),
    ],
)
def test_columns_of_bytes(column: pa.Array, tmp_path: Path) -> None:
    reader = photos(write_parquet(tmp_path / "t.parquet", {"jpg": column, "n": pa.array("abc")}))
    assert reader.read("t-00000000") == b"x" and reader.read("t/t-00000001") == b"y"
    with pytest.raises(MissingPhotoError):
        reader.read("t-00000002")


def test_which_column_is_asked_for(tmp_path: Path) -> None:
    two = {"image": pa.array([b"i"]), "mask": pa.array([b"m"]), "text": pa.array(["t"])}
    path = write_parquet(tmp_path / "t.parquet", two)
    with pytest.raises(ConfigError, match=r"2 columns .*: image, mask; name .*pack.image_column"):
        photos(path)
    assert photos(path, image_column="mask").read("t-00000000") == b"m"  # the remedy
    with pytest.raises(ConfigError, match=r"no such column 'text'; .* are: image, mask"):
        photos(path, image_column="text")
    with pytest.raises(ConfigError, match=r"0 columns .* are: none; give the photos"):
        photos(write_parquet(tmp_path / "u.parquet", {"text": pa.array(["t"])}))


def test_several_files_and_equal_names(tmp_path: Path, moto_s3: S3Server) -> None:
    for n in range(2):
        rows = [{"bytes": b"%d" % n, "path": "a.jpg"}, {"bytes": b"-%d" % n, "path": f"{n}.jpg"}]
        write_parquet(tmp_path / f"train-{n}.parquet", {"image": pa.array(rows, HUGGING_FACE)})
    reader = photos(tmp_path / "train-*.parquet")
    assert reader.read("0") == b"-0" and reader.read("train-1/a.jpg") == b"1"
    with pytest.raises(DataError, match=r"^ambiguous: a names both train-0/a.jpg and train-1/a"):
        reader.read("a")
    write_arrow(tmp_path / "x.arrow", {"image": pa.array([b"x"])}, stream=True)
    open_store(url := moto_s3.url()).create("x.arrow", tmp_path / "x.arrow")
    with pytest.raises(ConfigError, match=r"local folder only; copy it there, or save it as Parq"):
        photos(f"{url}/x.arrow")


def test_a_photo_above_the_limit_is_not_given(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"image": pa.array([bytes(1001), b"x"])})
    with pytest.raises(DataError, match=r"too large: t/t-00000000 has 1001 bytes, limit 1000"):
        photos(path, max_bytes=1000).read("t-00000000")
    assert photos(path, max_bytes=1000).read("t-00000001") == b"x"


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Groups in the order in which they are decoded."""
    groups: list[int] = []
    real = photo_tables._Table.decode

    def decode(self: photo_tables._Table, group: int) -> pa.ChunkedArray:
        groups.append(group)
        return real(self, group)

    monkeypatch.setattr(photo_tables._Table, "decode", decode)
    return groups


def test_a_group_is_decoded_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [bytes([n]) * 2000 for n in range(60)]
    path = write_parquet(tmp_path / "t.parquet", {"image": pa.array(content)}, group=10)
    order: Sequence[int] = random.Random(1).sample(range(60), 60)
    groups = decoded(monkeypatch)

    def read_all(cache: str) -> list[int]:
        groups.clear()
        reader = photos(path, cache=cache)
        assert all(reader.read(f"t-{n:08d}") == content[n] for n in order)
        return list(groups)

    assert sorted(read_all("")) == list(range(6))  # all are held in memory
    monkeypatch.setattr(photo_tables, "HELD_BYTES", 50_000)
    assert len(read_all("")) > 30
    cache = tmp_path / "cache"
    assert max(Counter(read_all(str(cache))).values()) == 2
    kept = len(list((cache / "photos").iterdir()))
    assert kept >= 4 and len(read_all(str(cache))) <= 6 - kept + 1  # as another process would
    write_parquet(path, {"image": pa.array(content[::-1])}, group=10)  # another file of that name
    content.reverse()
    assert len(read_all(str(cache))) >= 10


def test_reading_in_order_decodes_each_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"image": pa.array([b"GIF89a"] * 20)})
    monkeypatch.setattr(photo_tables, "HELD_BYTES", 1)
    groups = decoded(monkeypatch)
    reader = photos(path)
    assert [reader.read(name) for name in reader.list_names()] == [b"GIF89a"] * 20
    assert groups == list(range(10))


def test_rows_are_named_by_their_path_where_it_is_one() -> None:
    paths = [
        "a.jpg",
        None,
        "b/c.png",
        "a.png",
        "a.png",
        "../x.jpg",
        "/etc/passwd",
        "",
        "t-00000001",
    ]
    assert row_names(paths, count=9, stem="t") == [
        "a.jpg",
        "t-00000001",
        "b/c.png",
        *(f"t-0000000{row}" for row in range(3, 9)),
    ]
    assert row_names(None, count=2, stem="t") == ["t-00000000", "t-00000001"]


@given(st.lists(st.none() | st.text(max_size=3) | st.sampled_from(["t-00000000", "a/b", "a"])))
def test_names_are_unique_in_a_file(paths: list[str | None]) -> None:
    names = row_names(paths, count=len(paths), stem="t")
    assert len(set(names)) == len(paths) == len(names)
    assert all(".." not in name.split("/") and not name.startswith("/") for name in names)


@pytest.mark.parametrize("kind", ["parquet", "dictionary", "arrow file", "arrow stream"])
def test_mutilated_tables_give_bytes_or_errors(kind: str, tmp_path: Path) -> None:
    rows = [{"bytes": bytes([n]) * 300, "path": f"{n}.jpg"} for n in range(20)]
    columns = {"image": pa.array(rows, HUGGING_FACE), "label": pa.array(range(20))}
    if kind == "dictionary":
        columns = {"image": pa.array([row["bytes"] for row in rows]).dictionary_encode()}
    if kind.startswith("arrow"):
        path = write_arrow(tmp_path / "t", columns, stream=kind == "arrow stream")
    else:
        path = write_parquet(tmp_path / "t", columns)
    whole, answers = path.read_bytes(), Counter[str]()
    for seed in range(100):
        path.write_bytes(mutilations(whole, seed))
        try:
            reader = photos(path)
            names = [*reader.list_names(), "1.jpg", "t-00000003"]
        except (ConfigError, DataError) as error:
            str(error).encode()
            answers["not opened"] += 1
            continue
        for name in names:
            try:
                reader.read(name)
                answers["read"] += 1
            except DataError as error:
                str(error).encode()
                answers["refused"] += 1
    assert len(answers) == 3, answers
