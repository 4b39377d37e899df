"""Photos by name: the same answers of a folder, its zip and its bucket; nothing outside of them."""

import io
import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import S3Server
from vlal_dist.data.format.photos import Limits, MissingPhotoError, Photos, read_file
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.storage.store import open_store

FILES = {
    "lower.jpg": b"1",
    "UPPER.JPG": b"2",
    "web.webp": b"3",
    "scan.TIF": b"4",
    "fif.jfif": b"5",
    "bare": b"6",
    "twice.jpg": b"7",
    "twice.png": b"8",
    "sub/deep/in.png": b"9",
    "a.jpg.jpg": b"10",
    "caf\u00e9.jpg": b"11",
    "phone.heic": b"12",
    "both": b"13",
    "both.jpg": b"14",
}
NAMES = {
    "lower.jpg": b"1",
    "lower": b"1",
    "lower.JPG": b"1",
    "./lower": b"1",
    "UPPER": b"2",
    "web": b"3",
    "scan": b"4",
    "fif": b"5",
    "bare": b"6",
    "twice.jpg": b"7",
    "twice.png": b"8",
    "sub/deep/in": b"9",
    "sub\\deep\\in.png": b"9",
    "sub//deep/./in.png": b"9",
    "a.jpg": b"10",
    "phone": b"12",
    "both": b"14",
    "both.jpg": b"14",
}
REASONS = {
    "twice": "ambiguous: twice names both",
    "../lower": "outside: ",
    "sub/../lower.jpg": "outside: ",
    "sub\\..\\lower": "outside: ",
    "/etc/passwd": "outside: /etc/passwd is not below",
    "nothing": r"missing: .* tried nothing, and nothing followed by \.jpg",
    "nothing.jpg": "missing: .* tried nothing.jpg",
    "sub": "missing: ",
    "": "missing: ",
    ".": "missing: ",
    "/": "outside: ",
    "a\0b": "unreadable: ",
    "x" * 300: "missing: ",
    "y" * 5000 + "/z": "missing|unreadable",
    "lower.jpg/more": "missing: ",
}


def photos(*places: object, **limits: object) -> Photos:
    return Photos([str(place) for place in places], Limits("predict.images", **limits))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(
    params=["folder", "zip", "zip of the folder", "windows", "bucket", "tar", "bucket tar"]
)
def place(request: pytest.FixtureRequest, folder: Path, tmp_path: Path, moto_s3: S3Server) -> str:
    if request.param == "folder":
        return str(folder)
    if request.param == "bucket":
        url = moto_s3.url()
        for name, data in FILES.items():
            open_store(url).create(name, data)
        return url
    if request.param.endswith("tar"):
        path = write_tar(tmp_path / "a.tar", FILES)
        if request.param == "tar":
            return str(path)
        open_store(url := moto_s3.url()).create("shards/a.tar", path)
        return f"{url}/shards/*.tar"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in FILES.items():
            info = zipfile.ZipInfo(name)
            info.filename = {
                "zip": name,
                "zip of the folder": f"photos/{name}",
                "windows": name.replace("/", "\\"),
            }[request.param]
            archive.writestr(info, data)
    return str(tmp_path / "a.zip")


def test_names_mean_the_same_in_every_kind_of_place(place: str) -> None:
    reader = photos(place)
    for name, data in NAMES.items():
        assert reader.read(name) == data, name
    for name, reason in REASONS.items():
        with pytest.raises(DataError, match=f"^({reason})"):
            reader.read(name)
    if not place.startswith("s3:") or place.endswith(
        ".tar"
    ):  # a bucket is not listed for a name in another case
        assert reader.read("LOWER") == b"1" and reader.read("cafe\u0301") == b"11"
    each = list(reader.read_each([*NAMES, *REASONS, "lower"]))
    assert each[: len(NAMES)] == list(NAMES.values()) and each[-1] == b"1"
    for found, reason in zip(each[len(NAMES) : -1], REASONS.values(), strict=True):
        assert re.match(reason, str(found))
    names = reader.list_names()
    assert names == sorted(names) and len(names) == len(FILES) and not reader.left_out
    assert reader.read(next(name for name in names if name.endswith("twice.png"))) == b"8"


def test_a_listed_name_is_exactly_that_file(folder: Path) -> None:
    (folder / "both").write_bytes(b"GIF89a of its own")
    reader = photos(folder)
    assert reader.read("both") == b"14"
    assert "both" in reader.list_names() and reader.read("both") == b"GIF89a of its own"
    with pytest.raises(DataError, match=r"^left out: not a photo"):
        reader.read("bare")
    assert reader.read("lower.jpg") == b"1"  # by its suffix; decoding it says what it is


def test_absolute_paths_count_below_the_place_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jpg").write_bytes(b"x")
    (tmp_path / "alias").symlink_to(folder)
    reader = photos(folder)
    for name in (folder / "lower.jpg", folder / "lower", tmp_path / "alias" / "lower.jpg"):
        assert reader.read(str(name)) == b"1"
    assert photos(tmp_path / "alias").read(str(folder / "lower.jpg")) == b"1"
    with pytest.raises(
        DataError, match=r"outside: .* name a folder that holds it as predict.images"
    ):
        reader.read(str(tmp_path / "other.jpg"))
    assert photos(tmp_path).read(str(tmp_path / "other.jpg")) == b"x"  # the remedy
    (tmp_path / "photos2").mkdir()  # no prefix of text, but of folders
    (tmp_path / "photos2/a.jpg").write_bytes(b"y")
    with pytest.raises(DataError, match=r"outside"):
        reader.read(str(tmp_path / "photos2/a.jpg"))
    assert photos(folder, tmp_path / "photos2").read(str(tmp_path / "photos2/a.jpg")) == b"y"


def test_links_lead_out_of_a_place_only_if_that_is_said(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "far.jpg").write_bytes(b"far")
    (folder / "link.jpg").symlink_to(outside / "far.jpg")
    (folder / "dir").symlink_to(outside)
    (folder / "near.jpg").symlink_to(folder / "lower.jpg")
    reader = photos(folder)
    assert reader.read("near") == b"1"
    for name in ("link.jpg", "link", "dir/far.jpg", "dir/far", "dir/none"):
        with pytest.raises(DataError, match=r"outside: .* predict\.follow_links: true"):
            reader.read(name)
    for allowed in (photos(folder, follow_links=True), photos(folder, outside)):
        for name in ("link.jpg", "link", "dir/far.jpg", "dir/far"):
            assert allowed.read(name) == b"far"


def test_pipes_and_devices_are_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "self.jpg").symlink_to("self.jpg")
    reader = photos(folder, follow_links=True)
    for name, reason in {
        "pipe": "not a file: .*pipe",
        "zero": "not a file: .*device",
        "gone": "missing: ",
        "self": "unreadable: .*symbolic links",
    }.items():
        with pytest.raises(DataError, match=f"^{reason}"):
            reader.read(name)
    listed = reader.list_names()
    assert {"gone.jpg", "self.jpg"} < set(listed) and "zero.jpg" not in listed
    assert reader.left_out == {"special file": 2}
    with pytest.raises(DataError, match=r"not a file"):
        read_file("/dev/zero", Limits(""))


def test_links_are_listed_without_loops(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "more").mkdir(parents=True)
    (outside / "more/far.jpg").write_bytes(b"far")
    (outside / "back").symlink_to(folder)
    (folder / "dir").symlink_to(outside)
    (folder / "sub" / "up").symlink_to("..")
    for n in range(12):  # each with links to all: more paths than could ever be listed
        (outside / f"f{n}").mkdir()
        for m in range(12):
            (outside / f"f{n}/{m}").symlink_to(outside / f"f{m}")
    (folder / ".hidden").mkdir()
    (folder / ".hidden/a.jpg").write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    reader = photos(folder)
    assert sorted([*FILES, "dir/more/far.jpg"]) == reader.list_names()
    assert reader.left_out == {"hidden": 2, "link to a folder that is listed": 146}


def test_names_that_are_no_text(folder: Path) -> None:
    raw = os.fsencode(folder) + b"/caf\xe9.gif"
    with open(raw, "wb") as file:
        file.write(b"GIF89a")
    reader = photos(folder)
    assert reader.read("caf\udce9.gif") == b"GIF89a" and "caf\udce9.gif" in reader.list_names()
    with pytest.raises(DataError, match=r"^(missing|unreadable): .*\\ud83d") as caught:
        reader.read("\ud83d")
    str(caught.value).encode()
    (folder / "caf\udce9.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"ambiguous: ") as caught:
        photos(folder).read("caf\udce9")
    str(caught.value).encode()


def test_files_above_the_limit_are_not_read(folder: Path, tmp_path: Path) -> None:
    with open(folder / "large.jpg", "wb") as file:
        file.truncate(3 << 40)  # sparse: reading it would take all memory
    with pytest.raises(DataError, match=r"too large: .*3298534883328 bytes, .*predict\.max_bytes"):
        photos(folder).read("large")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(5_000_000))
    with pytest.raises(DataError, match=r"too large: bomb.jpg has 5000000 bytes, limit 1000000"):
        photos(tmp_path / "bomb.zip", max_bytes=1_000_000).read("bomb")
    assert len(photos(tmp_path / "bomb.zip", max_bytes=5_000_000).read("bomb")) == 5_000_000
    data = bytearray((tmp_path / "bomb.zip").read_bytes())
    entry = data.rfind(b"PK\x01\x02")  # declare 100 bytes where there are five million
    data[entry + 24 : entry + 28] = struct.pack("<I", 100)
    (tmp_path / "liar.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"^(too large|unreadable)"):
        photos(tmp_path / "liar.zip", max_bytes=1_000_000).read("bomb")


def test_a_limit_holds_for_objects(moto_s3: S3Server) -> None:
    open_store(url := moto_s3.url()).create("a.jpg", bytes(1001))
    with pytest.raises(DataError, match=r"too large: a.jpg has 1001 bytes"):
        photos(url, max_bytes=1000).read("a.jpg")
    assert len(photos(url, max_bytes=1001).read("a")) == 1001


def edited(path: Path, offset: int, value: bytes) -> Path:
    """A copy of a zip with bytes of its last central entry replaced."""
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + offset : entry + offset + len(value)] = value
    target = path.with_name(f"{offset}.zip")
    target.write_bytes(data)
    return target


def test_zips_of_odd_content(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("shirts/1.jpg", b"s")
        archive.writestr("pants/1.jpg", b"p")
        with pytest.warns(UserWarning, match=r"Duplicate"):
            archive.writestr("pants/1.jpg", b"q")
        archive.writestr("__MACOSX/._1.jpg", b"m")
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("last.jpg", b"l" * 100)
    reader = photos(path)
    with pytest.raises(DataError, match=r"ambiguous: 1.jpg names both .*1.jpg"):
        reader.read("1.jpg")
    assert reader.read("shirts/1") == b"s" and reader.read("last") == b"l" * 100
    with pytest.raises(DataError, match=r"ambiguous: .* 2 members of the name pants/1.jpg"):
        reader.read("pants/1.jpg")
    with pytest.raises(MissingPhotoError):
        reader.read("link.jpg")
    assert reader.list_names() == ["last.jpg", "pants/1.jpg", "shirts/1.jpg"]
    for offset, value, reason in (
        (8, b"\x01", "unreadable: last.jpg is encrypted"),
        (10, b"\x0c", "unreadable: last.jpg is compressed by method 12; make the zip with stored"),
        (42, bytes(4), "unreadable: "),  # the header of another member
        (20, struct.pack("<I", 90), "unreadable: "),
    ):
        with pytest.raises(DataError, match=f"^{reason}"):
            photos(edited(path, offset, value)).read("last.jpg")
    data = path.read_bytes()
    for name, damaged in (
        ("cut", data[:-40]),
        ("entry", data.replace(b"PK\x01\x02", b"PK\x01\x07")),
    ):
        (tmp_path / f"{name}.zip").write_bytes(damaged)
        with pytest.raises((ConfigError, DataError), match=r"damaged|no zip, tar or table"):
            photos(tmp_path / f"{name}.zip")


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(100_000))
        archive.writestr("b.jpg", b"b" * 1000)
    data = bytearray(path.read_bytes())
    first, second = (at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(DataError, match=r"unreadable: .* overlaps"):
            photos(path).read(name)


def test_a_single_photo_is_a_place(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "PNG")
    (tmp_path / "one").write_bytes(sink.getvalue())
    (tmp_path / "two.png").write_bytes(sink.getvalue())
    reader = photos(tmp_path / "one")
    assert reader.list_names() == ["one"] and reader.read("one") == sink.getvalue()
    with pytest.raises(MissingPhotoError):
        photos(tmp_path / "one").read("two")
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(ConfigError, match=r"no photo and no zip, tar or table"):
        photos(tmp_path / "text.jpg")


MEMBERS = {name: name.encode() * 50 for name in ("a.jpg", "sub/b.png", "c.gif")}
EDITS = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\xff", b"PK\1\2", b"../", b"\\"]) | st.binary(),
    st.booleans(),
)


@given(deflated=st.booleans(), edits=st.lists(EDITS, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_edited_zip_gives_a_member_s_bytes_or_an_error(
    tmp_path: Path, deflated: bool, edits: list[tuple[float, bytes, bool]]
) -> None:
    sink = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    data = bytearray(sink.getvalue())
    for where, value, inserted in edits:
        at = int(where * len(data))
        data[at : at if inserted else at + len(value)] = value
    (tmp_path / "edited.zip").write_bytes(data)
    try:
        reader = photos(tmp_path / "edited.zip")
    except (ConfigError, DataError):
        return
    # Edited at its beginning it may be a photo by content, or a member empty with the sum of that.
    allowed = {*MEMBERS.values(), bytes(data), b""}
    for name in ["a", "b", *MEMBERS, *reader.list_names()]:
        try:
            assert reader.read(name) in allowed
        except DataError as error:
            str(error).encode()
