"""Packing: the same bytes whatever happens, crops as the authors cut them, bad input counted."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shard_tools.clean.records import WHOLE_PHOTO
from shard_tools.instances import InstanceRow
from shard_tools.pack import decode_photo, make_sample, plan_shards
from tests.fixtures.odd_photos import odd_photos
from tests.fixtures.scored_dataset import write_scores
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from vlal_dist.config.sections import PackConfig
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.format.images import crop_bounds, open_photo
from vlal_dist.data.format.photos import Limits, MissingPhotoError, Photos
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.tar import sample_key
from vlal_dist.errors import DataError

SETTINGS = PackConfig(name="d", max_pixels=10_000_000)


def tree(root: Path) -> dict[str, str]:
    """Every data file under a root -> sha256; results of runs hold times and are left out."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".result." not in path.name and ".config." not in path.name
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    config = write_small_vaw(folder)
    run_all(config, ["clean", "pack", "verify", "inspect"])
    return folder


def jpeg(width: int, height: int, **options: object) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=90, **options)
    return sink.getvalue()


def instance(box: tuple[float, float, float, float]) -> InstanceRow:
    return InstanceRow("7", "photo", 2, box, [1], [3])


def test_bytes_do_not_depend_on_the_number_of_workers(packed: Path, tmp_path: Path) -> None:
    config = packed / "config.yaml"
    assert run("pack", config, "--paths.dataset", str(tmp_path), "--pack.workers", "2") == 0
    assert tree(tmp_path) == tree(packed / "dataset")
    assert len(list((packed / "dataset/train/shards").iterdir())) > 2


def test_packing_again_changes_nothing(packed: Path) -> None:
    before = tree(packed / "dataset")
    assert run("pack", packed / "config.yaml") == 0
    assert tree(packed / "dataset") == before


def test_killed_and_run_again_gives_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shard_tools", "pack", "--config"]
    command += [str(packed / "config.yaml"), "--paths.dataset", str(tmp_path), "--pack.workers"]
    for seconds in (0.9, 1.2, 1.6):
        process = subprocess.Popen([*command, "1"], start_new_session=True, stderr=-3, stdout=-3)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run("pack", packed / "config.yaml", "--paths.dataset", str(tmp_path)) == 0
    assert tree(tmp_path) == tree(packed / "dataset")


def test_other_settings_are_not_mixed_into_a_dataset(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", packed / "config.yaml", "--pack.jpeg_quality", "80") == 65
    assert "other settings: crops.jpeg_quality was 95, now 80 (" in capsys.readouterr().err


def test_instances_of_a_photo_are_adjacent_and_blocks_cover_the_index(packed: Path) -> None:
    split = open_split(open_dataset(str(packed / "dataset"), cache=packed / "cache"), "train")
    samples = [SampleReader(split).read(row) for row in range(split.num_samples)]
    photos = [
        json.loads(SampleReader(split).read_members(s.row)[1]["json"])["image_id"] for s in samples
    ]
    changes = sum(one != other for one, other in pairwise(photos))
    assert changes + 1 == len(set(photos)) == 24
    assert photos != sorted(photos)
    ends = split.blocks.first_row + split.blocks.samples
    assert ends[:-1].tolist() == split.blocks.first_row[1:].tolist() and len(split.blocks) > 5
    assert int(ends[-1]) == split.num_samples


def test_plain_tarfile_and_plain_webdataset_read_the_tars(packed: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset
    split = open_split(open_dataset(str(packed / "dataset"), cache=packed / "cache"), "train")
    ours = [SampleReader(split).read(row) for row in range(split.num_samples)]
    by_key = {sample.key: sample for sample in ours}
    seen = []
    for shard in split.shards:
        path = packed / "dataset/train/shards" / shard.name
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for name in names:
                key, part = name.split(".", 1)
                member = tar.extractfile(name)
                assert member is not None
                if part == "jpg":
                    assert member.read() == by_key[key].jpg
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = list(webdataset.WebDataset(str(path), shardshuffle=False))
        assert [f"{one['__key__']}.{p}" for one in read for p in ("jpg", "json")] == names
        for one in read:
            sample = by_key[one["__key__"]]
            assert one["jpg"] == sample.jpg
            assert json.loads(one["json"])["positive"] == sample.positive
            seen.append(one["__key__"])
    assert seen == [sample.key for sample in ours]


def test_bytes_are_those_of_webdatasets_own_writer(packed: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from webdataset.writer import TarWriter
    split = open_split(open_dataset(str(packed / "dataset"), cache=packed / "cache"), "val")
    sink = io.BytesIO()
    writer = TarWriter(sink, encoder=False, mtime=0, user="", group="", mode=0o444)
    for row in range(split.shards[0].samples):
        key, members = SampleReader(split).read_members(row)
        writer.write({"__key__": key, **members})
    writer.close()
    path = packed / "dataset/val/shards" / split.shards[0].name
    assert path.read_bytes() == sink.getvalue()


def test_crops_are_cut_as_the_authors_cut_them() -> None:
    photo = Image.fromarray(
        np.arange(60 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 80, 3)
    )
    sink = io.BytesIO()
    photo.save(sink, "PNG")
    decoded = decode_photo(sink.getvalue(), SETTINGS)
    box = (10.9, 5.2, 20.4, 30.9)
    assert crop_bounds(box, width=80, height=60, expansion=0.0) == (10, 5, 31, 36)
    assert crop_bounds(box, width=80, height=60, expansion=0.3) == (7, 2, 34, 39)
    _, sample, _ = make_sample(instance(box), decoded, SETTINGS)
    assert sample.key == "7"
    offset, length = sample.members["jpg"]
    crop = open_photo(sample.data[offset : offset + length], max_pixels=10**6)
    assert crop.size == (21, 31)
    offset, length = sample.members["json"]
    meta = json.loads(sample.data[offset : offset + length])
    assert np.allclose(meta["box_in_crop"], [0.9, 0.2, 20.4, 30.9])


def test_outside_the_photo_the_crop_is_zero() -> None:
    decoded = decode_photo(jpeg(40, 40), SETTINGS)
    _, sample, _ = make_sample(instance((-10, 30, 30, 30)), decoded, SETTINGS)
    offset, length = sample.members["jpg"]
    pixels = np.asarray(Image.open(io.BytesIO(sample.data[offset : offset + length])))
    assert pixels.shape == (30, 30, 3)
    assert pixels[15:, :].mean() < 3 and pixels[:8, 15:].mean() > 60


def test_a_whole_plain_jpeg_keeps_its_bytes_and_a_turned_one_does_not() -> None:
    data = jpeg(40, 30)
    decoded = decode_photo(data, SETTINGS)
    _, sample, _ = make_sample(instance((0, 0, 40, 30)), decoded, SETTINGS)
    offset, length = sample.members["jpg"]
    assert sample.data[offset : offset + length] == data
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_photo(jpeg(40, 30, exif=exif), SETTINGS)
    assert turned.image.size == (30, 40) and turned.jpeg is None


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    form=st.sampled_from(["JPEG", "PNG", "turned"]),
    expansion=st.sampled_from([0.0, 0.3]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_whole_photo_is_the_box_of_its_size(
    width: int, height: int, form: str, expansion: float
) -> None:
    settings = SETTINGS.model_copy(update={"box_expansion": expansion})
    exif = Image.Exif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    options = {"exif": exif} if form == "turned" else {}
    Image.fromarray(pixels).save(sink, "PNG" if form == "PNG" else "JPEG", **options)
    photo = decode_photo(sink.getvalue(), settings)
    box = (0.0, 0.0, float(photo.image.width), float(photo.image.height))
    whole = make_sample(instance(WHOLE_PHOTO), photo, settings)
    assert whole == make_sample(instance(box), photo, settings)
    assert whole[2]["box_in_crop"] == list(box) and "Infinity" not in json.dumps(whole[2])
    if form == "JPEG":
        assert stored(sink.getvalue(), WHOLE_PHOTO, settings) == photo.jpeg


def test_whole_photos_are_planned_at_100_kb_each() -> None:
    rows = [InstanceRow(str(n), f"photo{n}", 2, WHOLE_PHOTO, [1], []) for n in range(100)]
    settings = SETTINGS.model_copy(update={"shard_bytes": 1_000_000})
    tasks = plan_shards(rows, "train", "root", settings)
    assert [len(task.instances) for task in tasks] == [10] * 10


def stored(photo: bytes, box: tuple[float, float, float, float], settings: PackConfig) -> bytes:
    """The crop that pack stores."""
    crop = make_sample(instance(box), decode_photo(photo, settings), settings)
    offset, length = crop[1].members["jpg"]
    return crop[1].data[offset : offset + length]


@pytest.mark.parametrize("name", ["jpeg_private", "jpeg_trailing", "gif_animated"])
def test_no_crop_holds_metadata_unless_they_are_asked_for(name: str) -> None:
    (odd,) = (one for one in odd_photos() if one.name == name)
    assert b"SECRET" in odd.data
    for box in ((0, 0, 96, 72), (3, 3, 50, 40)):
        assert not re.search(rb"SECRET|SERIAL|Exif", stored(odd.data, box, SETTINGS))
    keeping = SETTINGS.model_copy(update={"keep_metadata": True})
    if name != "gif_animated":
        assert stored(odd.data, (0, 0, 96, 72), keeping) == odd.data
    assert b"SECRET" not in stored(odd.data, (3, 3, 50, 40), keeping)


def test_background_and_metadata_are_part_of_the_dataset(packed: Path, tmp_path: Path) -> None:
    crops = json.loads((packed / "dataset/dataset.json").read_text())["crops"]
    assert (crops["background"], crops["keep_metadata"]) == ("#ffffff", False)
    (odd,) = (one for one in odd_photos() if one.name == "png_rgba")
    black = SETTINGS.model_copy(update={"background": "#000000"})
    corner = [
        np.asarray(Image.open(io.BytesIO(stored(odd.data, (0, 0, 96, 72), one))))[:, 0].mean()
        for one in (SETTINGS, black)
    ]
    assert corner[0] > 250 and corner[1] < 5  # fully transparent there
    other = ("--paths.dataset", str(tmp_path), "--pack.background")
    assert run("pack", packed / "config.yaml", *other, "white") == 64
    assert run("pack", packed / "config.yaml", *other, "#0A64C8") == 0
    crops = json.loads((tmp_path / "dataset.json").read_text())["crops"]
    assert crops["background"] == "#0a64c8"
    assert run("pack", packed / "config.yaml", *other, "#ffffff") == 65  # packed with another one


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (jpeg(80, 80)[:2000], "truncated or damaged"),
        (jpeg(80, 80)[:-30], "truncated or damaged"),
    ],
)
def test_damaged_photos_are_refused_and_never_half_decoded(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_photo(data, SETTINGS)


def test_a_pixel_bomb_is_refused_by_its_header() -> None:
    sink = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(sink, "PNG")
    with pytest.raises(DataError, match="too large: 20000x20000"):
        decode_photo(sink.getvalue(), SETTINGS)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, 70_000, 30), "box too large"),
        ((0, 0, 1e12, 20), "box too large"),
        ((1e308, 0, 1e308, 20), "box too large"),
        ((0, 0, 60_000, 60_000), "box too large"),
        ((0, 0, 1, 501), "box too narrow"),
        ((10, 10, 0.5, 20), "zero size"),
        ((40, 0, 10, 10), "box outside"),
    ],
)
def test_boxes_beyond_any_crop_are_refused(box: tuple[float, ...], reason: str) -> None:
    photo = decode_photo(jpeg(40, 40), SETTINGS)
    with pytest.raises(DataError, match=reason):
        make_sample(instance(box), photo, SETTINGS)  # type: ignore[arg-type]


def test_a_damaged_exif_block_is_a_reject_and_not_a_crash() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    data = bytearray(jpeg(40, 30, exif=exif))
    entry = data.find(bytes([0x01, 0x12, 0x00, 0x03])) if b"MM" in data[:40] else -1
    entry = entry if entry >= 0 else data.find(bytes([0x12, 0x01, 0x03, 0x00]))
    assert entry > 0
    for length in range(entry, entry + 40):  # cut the block at every place
        broken = bytes(data[:length]) + bytes(40) + bytes(data[length + 40 :])
        try:
            decode_photo(broken, SETTINGS)
        except DataError as error:
            assert "damaged" in str(error) or "not an image" in str(error)


def test_places_are_searched_in_order(tmp_path: Path) -> None:
    folder, archive = tmp_path / "folder", tmp_path / "a.zip"
    folder.mkdir()
    (folder / "x.jpg").write_bytes(b"folder")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("deep/x.png", b"zip" * 100)

    def find(image_id: str, *places: Path) -> bytes:
        return Photos([str(place) for place in places], Limits("pack.images")).read(image_id)

    assert find("x", archive, folder) == b"zip" * 100
    assert find("x", folder, archive) == b"folder"
    with pytest.raises(MissingPhotoError, match="missing: no such photo"):
        find("y", folder)
    with pytest.raises(MissingPhotoError, match="tried x"):
        find("x" * 300, folder)
    data = bytearray(archive.read_bytes())
    data[data.find(b"deep/x.png") + 12] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(DataError, match="unreadable"):
        find("x", archive)


def test_a_killed_parent_leaves_no_worker(packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shard_tools", "pack", "--config"]
    command += [str(packed / "config.yaml"), "--paths.dataset", str(tmp_path)]
    process = subprocess.Popen(command, stderr=-3, stdout=-3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    workers: list[str] = []
    while not workers and time.monotonic() < deadline:
        found = children.read_text().split()
        workers = [pid for pid in found if "spawn_main" in _command(pid)]
        time.sleep(0.01)
    assert workers
    process.kill()
    process.wait()
    while any("spawn_main" in _command(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_an_altered_index_is_refused_when_opened(packed: Path, tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    shutil.copytree(packed / "dataset", root)
    for name in ("vocabulary.json", "train/index.arrow"):
        path = root / name
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"vocabulary\.json"):
        open_dataset(str(root), cache=tmp_path)
    shutil.copy(packed / "dataset/vocabulary.json", root / "vocabulary.json")
    with pytest.raises(DataError, match=r"train/index\.arrow"):
        open_split(open_dataset(str(root), cache=tmp_path), "train")


def test_a_sample_key_holds_no_line_end() -> None:
    assert sample_key("123", 7) == "123"
    assert sample_key("123\n", 7) == sample_key("a.b", 7) == f"{7:016x}"


def test_rejects_are_counted_and_the_rest_is_packed(tmp_path: Path) -> None:
    config = write_small_vaw(tmp_path)
    (tmp_path / "photos/train3.jpg").unlink()
    (tmp_path / "photos/train5.jpg").write_bytes(jpeg(160, 120)[:900])
    records = json.loads((tmp_path / "train.json").read_text())
    records[0]["instance_bbox"] = [400, 400, 40, 40]
    (tmp_path / "train.json").write_text(json.dumps(records))
    assert run("clean", config) == 0
    assert run("pack", config) == 65  # complete, but above max_rejected
    assert run("pack", config, "--pack.max_rejected", "0.2", "--json", str(tmp_path / "c")) == 0
    counts = json.loads((tmp_path / "c").read_text())
    assert counts["rejected"] == 7 and counts["samples"]["train"] == 72 - 7
    rows = pq.read_table(tmp_path / "dataset/train/rejects.parquet").to_pylist()
    reasons = sorted(row["reason"] for row in rows)
    assert reasons == ["box outside"] + 3 * ["missing"] + 3 * ["truncated or damaged"]
    assert run("verify", config) == 0
    write_scores(tmp_path)
    assert run("merge", config) == 0
    merged = json.loads((tmp_path / "merged/dataset.json").read_text())
    assert merged["splits"]["train"]["rejected"] == 7


def test_photos_are_read_straight_from_a_zip(packed: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in sorted((packed / "photos").iterdir()):
            target.write(path, f"VG_100K/{path.name}")
    arguments = ("--pack.images", f"[{archive}]", "--paths.dataset", str(tmp_path / "d"))
    assert run("pack", packed / "config.yaml", *arguments) == 0
    assert tree(tmp_path / "d") == tree(packed / "dataset")


@pytest.mark.parametrize("damage", ["flip", "cut_on_a_member", "cut_inside", "missing", "swapped"])
def test_verify_and_the_reader_find_damage_that_tarfile_does_not(
    packed: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "dataset"
    shutil.copytree(packed / "dataset", root)
    shards = sorted((root / "train/shards").iterdir())
    path, data = shards[0], bytearray(shards[0].read_bytes())
    path.chmod(0o644)
    if damage == "flip":
        data[600] ^= 1
        path.write_bytes(data)
    elif damage == "cut_on_a_member":
        split = open_split(open_dataset(str(root), cache=tmp_path), "train")
        path.write_bytes(data[: int(split.index.offset[4])])
    elif damage == "cut_inside":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(shards[1].read_bytes())
    arguments = ("--paths.dataset", str(root), "--paths.merged", str(tmp_path / "none"))
    assert run("verify", packed / "config.yaml", *arguments) == 65
    assert path.name in capsys.readouterr().err
    split = open_split(open_dataset(str(root), cache=tmp_path), "train")
    reader = SampleReader(split)
    with pytest.raises((DataError, OSError), match=path.name):
        for row in range(split.shards[0].samples):
            reader.read(row)


def test_image_ids_name_photos_of_any_suffix_below_the_named_folder_only(tmp_path: Path) -> None:
    config = write_small_vaw(tmp_path)
    photos, records = tmp_path / "photos", json.loads((tmp_path / "train.json").read_text())
    ids = list(dict.fromkeys(record["image_id"] for record in records))
    (photos / "sub").mkdir()
    Image.open(photos / f"{ids[0]}.jpg").save(photos / f"{ids[0]}.WEBP")
    (photos / f"{ids[0]}.jpg").unlink()
    (photos / f"{ids[1]}.jpg").rename(photos / f"{ids[1]}.JPG")
    (photos / f"{ids[2]}.jpg").rename(photos / "sub/named.jpg")
    Image.open(photos / f"{ids[3]}.jpg").save(photos / f"{ids[3]}.png")
    (photos / f"{ids[4]}.jpg").rename(tmp_path / "secret.jpg")
    (photos / f"{ids[5]}.jpg").rename(tmp_path / "linked.jpg")
    (photos / f"{ids[5]}.jpg").symlink_to(tmp_path / "linked.jpg")
    os.mkfifo(photos / "pipe.jpg")
    names = {ids[2]: "sub/named.jpg", ids[4]: str(tmp_path / "secret"), ids[6]: "pipe",
             ids[7]: "../secret"}  # fmt: skip
    for record in records:
        record["image_id"] = names.get(record["image_id"], record["image_id"])
    (tmp_path / "train.json").write_text(json.dumps(records))
    assert run("clean", config) == 0
    assert run("pack", config, "--pack.max_rejected", "1") == 0
    rows = pq.read_table(tmp_path / "dataset/train/rejects.parquet").to_pylist()
    reasons = {row["detail"].split()[0]: row["reason"] for row in rows}
    assert reasons == {
        ids[3]: "ambiguous",
        str(tmp_path / "secret"): "outside",
        f"{ids[5]}.jpg": "outside",
        "pack.images/pipe.jpg": "not a file",
        "../secret": "outside",
    }
    data = str(tmp_path / "linked")
    assert run("pack", config, "--pack.max_rejected", "1", "--pack.follow_links", "true",
               "--paths.dataset", data) == 0  # fmt: skip
    rows = pq.read_table(tmp_path / "linked/train/rejects.parquet").to_pylist()
    assert f"{ids[5]}.jpg" not in {row["detail"].split()[0] for row in rows}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": {"../x": 1}}, "Input should be 'train', 'val' or 'test'"),
        ({"splits": ["train"]}, "splits: Input should be"),
        ({"files": {}}, "has no digest of vocabulary.json, feasible.npz, test.parquet"),
        ({"vocabulary_digest": 3}, "vocabulary_digest: Input should be a valid string"),
        (None, "is damaged"),
    ],
)
def test_a_damaged_instances_root_is_an_error(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, message: str
) -> None:
    shutil.copytree(packed / "instances", tmp_path / "i")
    path = tmp_path / "i/clean.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, **change} if isinstance(change, dict) else "[" * 9999))
    roots = (f"--paths.instances={tmp_path / 'i'}", f"--paths.dataset={tmp_path / 'd'}")
    assert run("pack", packed / "config.yaml", *roots) == 65
    error = capsys.readouterr().err
    assert message in error and "run vlal clean into a new paths.instances" in error


def test_a_damaged_report_is_named_and_its_removal_helps(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "dataset"
    shutil.copytree(packed / "dataset", root)
    report = sorted((root / "train/parts").iterdir())[0]
    report.chmod(0o644)
    report.write_bytes(report.read_bytes()[:-20])
    arguments = ("--paths.dataset", str(root))
    assert run("pack", packed / "config.yaml", *arguments) == 65
    error = capsys.readouterr().err
    assert f"{report} is damaged" in error and "delete it and repeat the command" in error
    report.unlink()
    assert run("pack", packed / "config.yaml", *arguments) == 0
    assert tree(root) == tree(packed / "dataset")
