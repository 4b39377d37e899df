"""Packing in place: what is written beside tars of others, what is refused, and how it is read."""

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shard_tools.clean.records import WHOLE_PHOTO
from shard_tools.in_place import TarTask, index_tar
from shard_tools.instances import InstanceRow
from shard_tools.tar_samples import list_samples
from tests.fixtures.foreign_tars import (
    ATTRIBUTES,
    photo,
    samples,
    split_of,
    write_instances,
    write_tars,
)
from tests.fixtures.mutilate import mutilations
from tests.fixtures.tiny_vaw import run
from vlal_dist.config.sections import DataConfig, PackConfig
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split, read_labels
from vlal_dist.data.format.index import (
    INDEX_TYPES,
    check_blocks,
    form_blocks,
    index_from_columns,
)
from vlal_dist.data.format.photo_groups import image_numbers
from vlal_dist.data.format.photo_tars import find_tars
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.loading.batch_builder import BatchBuilder, BatchRequest
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.datasets import ShardDataset
from vlal_dist.errors import ConfigError, DataError


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.tar")}


def opened(root: Path) -> Dataset:
    return open_dataset(str(root / "dataset"), cache=root / "cache")


def add(archive: tarfile.TarFile, name: str, data: bytes, **options: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in options.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data) if info.isreg() else None)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars and a root that is packed in place."""
    root = tmp_path_factory.mktemp("in place")
    tars = write_tars(root / "tars")
    before = digests(root / "tars")
    assert run("pack", write_instances(root, tars)) == 0
    assert digests(root / "tars") == before
    return root


@pytest.fixture
def changed(packed: Path) -> Iterator[Path]:
    """The packed root, whose files a test may change: they are put back."""
    before = {
        path: path.read_bytes()
        for folder in ("tars", "dataset")
        for path in (packed / folder).rglob("*")
        if path.is_file()
    }
    yield packed
    for path, data in before.items():
        path.write_bytes(data)


def test_every_split_lists_the_tars_and_reads_its_own_rows(packed: Path) -> None:
    dataset = opened(packed)
    wanted = {sample["__key__"]: sample for number in range(3) for sample in samples(number)}
    found = {}
    for name in dataset.splits:
        split = open_split(dataset, name)
        assert [shard.name for shard in split.shards] == ["00000.tar", "00001.tar", "00002.tar"]
        assert {s.name: s.sha256 for s in split.shards} == digests(packed / "tars")
        assert dataset.manifest["splits"][name]["tars"] == str(packed / "tars")
        reader, labels = SampleReader(split), read_labels(dataset, name).to_pylist()
        for row, stated in enumerate(labels):
            sample = reader.read(row)
            assert all(getattr(sample, key) == value for key, value in stated.items())
            assert sample.box_in_crop == (0, 0, 64, 48)
            found[sample.key] = sample, name
        assert len(set(image_numbers(split))) == split.num_samples
    assert found.keys() == wanted.keys()
    for key, (sample, name) in found.items():
        about = json.loads(wanted[key]["json"])
        assert sample.jpg == wanted[key]["jpg"] and name == split_of(key)
        for ids, names in ((sample.positive, about["present"]), (sample.negative, about["absent"])):
            assert sorted(ATTRIBUTES[i] for i in ids) == sorted(names)


def test_library_and_verify_read_it(packed: Path) -> None:
    assert run("verify", packed / "config.yaml") == 0
    dataset = ShardDataset(packed / "dataset", image_size=64, cache=packed / "cache")
    split = open_split(opened(packed), "train")
    reader, items = SampleReader(split), dataset.__getitems__(range(len(dataset)))
    for row, item in enumerate(items):
        sample = reader.read(row)
        assert np.flatnonzero(item["labels"] == 1).tolist() == sample.positive
        assert np.flatnonzero(item["labels"] == -1).tolist() == sample.negative
        assert item["image"].shape == (3, 64, 64)


def test_reports_of_tars_continue_a_run(changed: Path) -> None:
    root = changed
    first = (root / "dataset/dataset.json").read_bytes()
    parts = root / "dataset/train/parts"
    assert sorted(p.name for p in parts.iterdir()) == [f"0000{n}.parquet" for n in range(3)]
    for path in (root / "dataset").glob("*/*.*"):
        path.unlink()
    (root / "dataset/dataset.json").unlink()
    (root / "dataset/train/parts/00001.parquet").unlink()
    assert run("pack", root / "config.yaml") == 0
    assert (root / "dataset/dataset.json").read_bytes() == first
    assert run("pack", root / "config.yaml", "--pack.in_place", "false") == 65


@pytest.mark.parametrize("stage", ["merge", "reshard"])
def test_stages_that_copy_samples_refuse(
    packed: Path, stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = packed / "scores"
    assert run(stage, packed / "config.yaml") == 64
    assert "pack with pack.in_place false" in capfd.readouterr().err
    assert not scores.exists()


def test_retry_rejected_refuses(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("pack", packed / "config.yaml", "--retry-rejected") == 64
    assert "never written" in capfd.readouterr().err


@pytest.fixture(scope="module")
def repacked(packed: Path) -> Dataset:
    """The same photos as samples of own tars."""
    target = packed / "repacked"
    words = ["--pack.in_place", "false", "--paths.dataset", str(target)]
    assert run("pack", packed / "config.yaml", *words) == 0
    return open_dataset(str(target), cache=packed / "cache")


def test_a_mix_labels_the_rows_of_both_kinds_of_tars(packed: Path, repacked: Dataset) -> None:
    datasets = [opened(packed), repacked, opened(packed)]
    corpus = ConcatSplits([open_split(one, "train") for one in datasets])
    reader = ShardReader(corpus)
    builder = BatchBuilder(reader, repacked, DataConfig(image_size=64, threads=2))
    rows = np.random.default_rng(1).permutation(len(corpus))
    with closing(builder):
        request = BatchRequest.plain(reader.locate(rows))
        batch = builder.start(request).result().batch
    tables = [read_labels(one, "train").to_pylist() for one in datasets]
    which, local = corpus.locate(rows)
    for label, dataset, row in zip(batch.label.numpy(), which, local, strict=True):
        assert np.flatnonzero(label == 1).tolist() == tables[dataset][row]["positive"]
        assert np.flatnonzero(label == -1).tolist() == tables[dataset][row]["negative"]


def test_repacked_samples_hold_the_same_labels(packed: Path, repacked: Dataset) -> None:
    again = repacked
    for name in again.splits:
        labels = {row["instance_id"]: row for row in read_labels(opened(packed), name).to_pylist()}
        for row in read_labels(again, name).to_pylist():
            stated = labels.pop(row["instance_id"])
            assert (row["positive"], row["negative"]) == (stated["positive"], stated["negative"])
        assert not labels


def test_replace_removes_what_lies_beside_the_tars(changed: Path) -> None:
    words = ["--pack.name", "other", "--replace"]
    before = digests(changed / "tars")
    assert run("pack", changed / "config.yaml", *words[:2]) == 65
    assert run("pack", changed / "config.yaml", *words) == 0
    assert opened(changed).name == "other" and digests(changed / "tars") == before
    assert run("verify", changed / "config.yaml") == 0


@pytest.mark.parametrize("kind", ["photo", "json", "header", "cut", "other size"])
def test_damage_after_packing_is_found(
    changed: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    root = changed
    dataset = opened(root)
    split = open_split(dataset, "train")
    row = 5
    start, jpg = int(split.index.offset[row]), int(split.index.jpg_offset[row])
    path = root / "tars" / split.shards[int(split.index.shard[row])].name
    data = bytearray(path.read_bytes())
    at = {"photo": start + jpg + 300, "json": start + 512 + 40, "header": start + 10}.get(kind)
    if at is not None:
        data[at] ^= 0x40
    path.write_bytes(data[: start + 700] if kind == "cut" else data + b"x" * (kind == "other size"))
    assert run("verify", root / "config.yaml") == 65
    text = capfd.readouterr().err
    assert str(path) in text and "sha256" in text
    if kind != "other size":
        with pytest.raises(
            DataError, match=rf"{path.name}: sample row {row} .*(crc32|ends before)"
        ):
            SampleReader(split).read(row)
        with pytest.raises(DataError, match=rf"{path.name}: sample uid .*(crc32|ends before)"):
            ShardDataset(root / "dataset", image_size=64, cache=root / "cache")[row]


def rejects(root: Path, split: str = "train") -> dict[str, str]:
    rows = pyarrow.parquet.read_table(root / f"dataset/{split}/rejects.parquet").to_pylist()
    return {row["instance_id"]: f"{row['reason']}: {row['detail']}" for row in rows}


def turned(data: bytes) -> bytes:
    image, sink = Image.open(io.BytesIO(data)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(sink, "JPEG", exif=exif)
    return sink.getvalue()


def test_what_cannot_be_used_in_place_is_rejected_with_the_reason(tmp_path: Path) -> None:
    tars, rng = write_tars(tmp_path / "tars", tars=1), np.random.default_rng(3)
    good = photo(rng, "red")
    with tarfile.open(tmp_path / "tars/odd.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "./folder", b"", type=tarfile.DIRTYPE)
        add(archive, "./folder/" + "n" * 120 + ".jpg", good, mtime=1.5)
        add(archive, "./é.jpg", good)
        add(archive, "key with blanks.jpg", good)
        add(archive, "two.jpg", good)
        add(archive, "two.seg.jpg", good)
        add(archive, "apart.jpg", good)
        add(archive, "between.jpg", good)
        add(archive, "apart.json", b"{}")
        add(archive, "twice.jpg", good)
        add(archive, "twice.jpg", good)
        add(archive, "turned.jpg", turned(good))
        add(archive, "cut.jpg", good[:-200])
        add(archive, "png.png", photo(rng, "red", kind="PNG"))
        add(archive, "png2.jpg", photo(rng, "red", kind="PNG"))
        add(archive, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="two.jpg")
        add(archive, "bare", good)
        add(archive, "last.jpg", good)
    names = {
        f"odd/folder/{'n' * 120}.jpg": "", "odd/é.jpg": "", "odd/key with blanks.jpg": "",
        "odd/two.jpg": "", "odd/two.seg.jpg": "not in place: its sample has another instance",
        "odd/between.jpg": "", "odd/apart.jpg": "not in place: members of its key lie in several",
        "odd/twice.jpg": "ambiguous: odd has 2", "odd/turned.jpg": "turned: its EXIF orientation",
        "odd/cut.jpg": "truncated or damaged", "odd/png.png": "not in place: no JPEG",
        "odd/png2.jpg": "not in place: no JPEG", "odd/link.jpg": "missing: no member",
        "odd/bare": "not in place: the member's name has no suffix",
        "odd/absent.jpg": "missing: no member odd/absent.jpg", "last": "",
        "elsewhere/absent.jpg": "missing: no member", "odd/../x.jpg": "outside: ",
    }  # fmt: skip
    count, whole = len(names), (0.0, 0.0, float("inf"), float("inf"))
    config = write_instances(
        tmp_path,
        tars,
        instance_id=[*names, "boxed"],
        image_id=[*names, "odd/last.jpg"],
        object_id=[0] * (count + 1),
        box=[whole] * count + [(0.0, 0.0, 8.0, 8.0)],
        positive=[[0]] * (count + 1),
        negative=[[]] * (count + 1),
    )
    assert run("pack", config, "--pack.max_rejected", "1") == 0
    found = rejects(tmp_path)
    assert found.pop("boxed").startswith("not in place: it has a box")
    for name, reason in names.items():
        assert found.pop(name, "").startswith(reason) and (reason or name not in found), name
    assert not found
    split = open_split(opened(tmp_path), "train")
    keys = [SampleReader(split).read(row).key for row in split.index.rows_of_shard(1)]
    assert keys == [f"./folder/{'n' * 120}", "./é", "key with blanks", "two", "between", "last"]
    assert run("verify", config) == 0


def test_settings_that_cannot_be_packed_in_place(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    shutil.copy(packed / "tars/00000.tar", tmp_path / "a/00000.tar")
    base = ["--paths.dataset", str(tmp_path / "dataset"), "--pack.images"]
    for images, text in {
        str(packed / "tars"): "packing in place reads tars",
        str(tmp_path / "none*.tar"): "no such file",
        f"[{packed}/tars/*.tar, {tmp_path}/a/*.tar]": "the same names",
    }.items():
        assert run("pack", packed / "config.yaml", *base, images) == 64
        assert text in capfd.readouterr().err
    assert not (tmp_path / "dataset/dataset.json").exists()
    assert run("pack", packed / "config.yaml", "--paths.dataset", str(packed / "tars")) == 64
    assert "lies in paths.dataset" in capfd.readouterr().err


@pytest.mark.parametrize(
    "change", ["rows", "ids", "pixels", "column", "bytes", "absent", "name", "json"]
)
def test_files_of_a_stranger_are_checked(changed: Path, change: str) -> None:
    forge(changed, change)
    with pytest.raises((DataError, ConfigError)):
        split = open_split(opened(changed), "train")
        SampleReader(split).read(0)


def forge(root: Path, change: str) -> None:
    """Alter a file of the split train, and state its new digest."""
    from vlal_dist.data.format.annotations import encode_annotations, map_annotations
    from vlal_dist.data.format.index import Shard, encode_index, encode_shards, map_index

    folder = root / "dataset/train"
    manifest = json.loads((root / "dataset/dataset.json").read_text())
    files, name = manifest["splits"]["train"]["files"], "annotations.arrow"
    columns = map_annotations(folder / name)._batch.to_pydict()
    data = (folder / name).read_bytes()
    if change == "rows":
        data = encode_annotations({key: values[1:] for key, values in columns.items()})
    elif change == "ids":
        columns["positive"][3] = [len(ATTRIBUTES)]
        data = encode_annotations(columns)
    elif change == "pixels":
        columns["width"][3] = 0
        data = encode_annotations(columns)
    elif change == "column":
        name, data = "annotations.arrow", (folder / "index.arrow").read_bytes()
    elif change == "bytes":
        data = data[: len(data) // 2] + data[len(data) // 2 + 8 :]
    elif change == "absent":
        del files[name]
    elif change == "name":
        name = "shards.parquet"
        data = encode_shards([Shard("../x.tar", 1000, "0" * 64, 1)])
    elif change == "json":
        name, index = "index.arrow", map_index(folder / "index.arrow")
        lengths = index.json_length.copy()
        lengths[0] = 1
        data = encode_index(type(index)(**{**vars(index), "json_length": lengths}))
    if change != "absent":
        (folder / name).write_bytes(data)
        files[name] = hashlib.sha256(data).hexdigest()
    (root / "dataset/dataset.json").write_text(json.dumps(manifest))


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 3000), st.booleans()), max_size=30),
    st.integers(1, 4000),
)
def test_blocks_are_runs_that_end_before_large_gaps(
    rows: list[tuple[int, int, bool]], block_bytes: int
) -> None:
    """Each row: bytes before it, its bytes, and whether it begins another tar."""
    columns: dict[str, list[int]] = {name: [] for name in INDEX_TYPES}
    shard = end = 0
    for gap, length, other in rows:
        shard, end = (shard + 1, 0) if other else (shard, end)
        values = {"shard": shard, "offset": end + gap, "length": length}
        for name, column in columns.items():
            column.append(values.get(name, 0))
        end += gap + length
    index = index_from_columns(columns)
    blocks = form_blocks(index, block_bytes=block_bytes)
    check_blocks(blocks, index, where="blocks")
    for first, count in zip(blocks.first_row.tolist(), blocks.samples.tolist(), strict=True):
        offset, last = index.offset[first : first + count], index.length[first : first + count]
        ends = offset + last
        assert all(offset[1:] - ends[:-1] < block_bytes)
        assert all(ends[:-1] - offset[0] < block_bytes)
        after = first + count
        if after < len(rows) and index.shard[after] == index.shard[first]:
            full = ends[-1] - offset[0] >= block_bytes
            assert full or index.offset[after] - ends[-1] >= block_bytes


def test_listing_names_damage(packed: Path, tmp_path: Path) -> None:
    whole = (packed / "tars/00000.tar").read_bytes()
    tar = find_tars(str(packed / "tars/00000.tar"), "x")[0]
    assert list_samples(tar).damage == "" and len(list_samples(tar).members) == 60
    second = list_samples(tar).members[2]
    third = second.offset + second.size + -second.size % 512
    for data, text in (
        (whole[:third], "without the end of a tar"),
        (whole[:third] + bytes(512) + whole[third + 512 :], "data behind its end"),
        (whole[:third] + b"?" + whole[third + 1 :], "damaged at byte"),
        (whole[: third + 1500], "damaged at byte"),
        (whole + b"more", "data behind its end"),
    ):
        (tmp_path / "t.tar").write_bytes(data)
        assert text in list_samples(find_tars(str(tmp_path / "t.tar"), "x")[0]).damage


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_mutilated_tars_are_indexed_or_rejected(packed: Path, tmp_path: Path, first: int) -> None:
    data = (packed / "tars/00000.tar").read_bytes()
    rows = [
        InstanceRow(f"{place}", f"00000/00000{place:04d}.jpg", 0, WHOLE_PHOTO, [0], [])
        for place in range(20)
    ]
    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars/00000.tar"
    for seed in range(first, first + 50):
        path.write_bytes(mutilations(data[:40_000], seed) + data[40_000:])
        tar = find_tars(str(path), "pack.images")[0]
        settings = PackConfig(name="mutilated", images=[str(path)])
        task = TarTask(str(tmp_path / str(seed)), tar, path.name, settings, {"train": rows})
        report = index_tar(task)["train"]
        assert report.samples + len(report.rejects) == len(rows)
        kept = path.read_bytes()
        for offset, length, crc in zip(
            *(report.columns[name] for name in ("offset", "length", "crc32")), strict=True
        ):
            assert zlib.crc32(kept[offset : offset + length]) == crc
        assert report.sha256 == hashlib.sha256(kept).hexdigest()
