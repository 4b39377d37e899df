"""Photos in tars: names, foreign headers, hostile and damaged files, reads of a bucket."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import S3Server
from tests.fixtures.mutilate import mutilations
from vlal_dist.data.format.photos import Limits, Photos
from vlal_dist.data.format.tar import ForeignMember, walk_tar
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.storage.s3 import S3Store
from vlal_dist.storage.store import open_store


def photos(*places: object, **limits: Any) -> Photos:
    return Photos([str(place) for place in places], Limits("pack.images", **limits))


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def walked(data: bytes) -> list[ForeignMember]:
    return list(walk_tar(lambda offset, length: data[offset : offset + length], len(data)))


def test_names_of_several_tars(tmp_path: Path) -> None:
    for shard in ("00", "01"):
        content = [member(f"{shard}{n}.jpg", f"{shard}{n}".encode()) for n in range(3)]
        content += [member("same.jpg", shard.encode()), member(f"deep/{shard}.png", b"d")]
        (tmp_path / f"{shard}.tar").write_bytes(tar_of(*content))
    (tmp_path / "02.txt").write_text("no tar")
    reader = photos(tmp_path / "*.tar")
    assert reader.read("000") == b"000" and reader.read("012.jpg") == b"012"
    assert reader.read("01/same.jpg") == b"01" and reader.read("00/same") == b"00"
    assert reader.read("deep/01.png") == reader.read("01/deep/01") == reader.read("01.png") == b"d"
    with pytest.raises(DataError, match=r"^ambiguous: same names both 00/same.jpg and 01/same.jpg"):
        reader.read("same")
    names = reader.list_names()
    assert len(names) == 10 and names[0] == "00/000.jpg" and reader.read(names[0]) == b"000"
    with pytest.raises(ConfigError, match=r"no such file"):
        photos(tmp_path / "x*.tar")
    with pytest.raises(ConfigError, match=r"a pattern names tars"):
        photos(tmp_path / "*.zip")
    for folder in ("s1", "s2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "00.tar").write_bytes(tar_of(member(f"{folder}.jpg", b"x")))
    with pytest.raises(
        ConfigError, match=r"the same names \(00/\.\.\.\); rename one, or give them"
    ):
        photos(tmp_path / "s?" / "*.tar")
    both = photos(tmp_path / "s1" / "*.tar", tmp_path / "s2" / "*.tar")  # the remedy
    assert both.read("s1.jpg") == both.read("s2.jpg") == both.read("00/s2.jpg") == b"x"


def test_a_tar_without_members_holds_no_photo(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of())
    reader = photos(tmp_path / "a.tar")
    assert reader.list_names() == [] and not reader.left_out
    with pytest.raises(DataError, match=r"^missing: "):
        reader.read("a")


def test_a_tar_that_changes_is_not_read_on(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(member("a.jpg", b"1")))
    reader = photos(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(tar_of(member("b.jpg", b"2"), member("a.jpg", b"1")))
    with pytest.raises(DataError, match=r"^unreadable: .*a\.tar has changed; repeat the command"):
        reader.read("a")


LONG = "folder/" * 40 + "photo.jpg"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_headers_are_read_as_tarfile_reads_them(form: int) -> None:
    names = ["a.jpg", "d/" * 30 + "b" * 90 + ".jpg", "./c.png", "n" * 90]
    names += [] if form == tarfile.USTAR_FORMAT else [LONG, "caf\u00e9.jpg", "bad\udce9.jpg"]
    members = [member(name, name.encode("utf-8", "replace") * 100) for name in names]
    members.insert(1, member("dir", type=tarfile.DIRTYPE))
    members.insert(2, member("link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd" * 9))
    members.insert(3, member("hard.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"))
    members.insert(4, member("pipe.jpg", type=tarfile.FIFOTYPE))
    if form == tarfile.PAX_FORMAT:
        members.append(member("p.jpg", b"p", pax_headers={"comment": "x" * 9, "path": "q.jpg"}))
    data = tar_of(*members, form=form)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        wanted = [(one.name, one.offset_data, one.size) for one in archive]
    found = walked(data)
    assert [(one.name, one.offset, one.size) for one in found] == wanted
    assert [one.kind for one in found if one.kind] == ["folder", "link", "link", "special file"]


def test_links_devices_and_sparse_members_are_left_out(tmp_path: Path) -> None:
    sparse = member(
        "s.jpg", b"1\n0\n", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    )
    data = tar_of(
        member("a.jpg", b"1"),
        member("link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("null.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        sparse,
        member(".hidden.jpg", b"h"),
        member("../out.jpg", b"o"),
        member("/absolute.jpg", b"b"),
    )
    (tmp_path / "a.tar").write_bytes(data)
    reader = photos(tmp_path / "a.tar")
    assert reader.list_names() == ["a/a.jpg", "a/absolute.jpg"]
    assert reader.left_out == {"link": 1, "special file": 1, "sparse": 1, "hidden": 2}
    for name in ("link", "null", "s", ".hidden", "out"):
        with pytest.raises(DataError, match=r"^missing: "):
            reader.read(name)
    with pytest.raises(DataError, match=r"^outside: "):
        reader.read("../out.jpg")
    assert reader.read("absolute") == b"b"


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "beyond the end": (lambda: header("a.jpg", 10**15) + bytes(512), "'a.jpg' has 10{15} bytes"),
    "negative": (lambda: header("a.jpg", -5) + bytes(1024), "'a.jpg' has -5 bytes"),
    "long name": (
        lambda: header("x", 10**12, tarfile.GNUTYPE_LONGNAME) + bytes(512),
        "an extended header of 10{12} bytes",
    ),
    "endless pax": (
        lambda: header("x", 5_000_000, tarfile.XHDTYPE) + bytes(5_000_192),
        "an extended header of 5000000 bytes",
    ),
    "pax length": (
        lambda: header("x", 512, tarfile.XHDTYPE) + b"999999999999 path=a\n".ljust(512, b"\0"),
        "a record of a wrong length",
    ),
    "pax size": (
        lambda: (
            header("x", 512, tarfile.XHDTYPE)
            + b"18 size=123456789\n".ljust(512, b"\0")
            + header("a.jpg", 1)
            + bytes(512)
        ),
        "'a.jpg' has 123456789 bytes",
    ),
    "pax size -1": (
        lambda: (
            header("x", 512, tarfile.XHDTYPE)
            + b"11 size=-1\n".ljust(512, b"\0")
            + header("a.jpg", 1)
            + bytes(512)
        ),
        "'a.jpg' has -1 bytes",
    ),
    "damaged header": (
        lambda: header("a.jpg", 0) + b"x" + header("b.jpg", 0)[1:] + bytes(1024),
        "damaged at byte 512, behind the member 'a.jpg': bad checksum; make the tar again",
    ),
    "cut header": (lambda: header("a.jpg", 0) + header("b.jpg", 0)[:300], "truncated header"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(1000), "compressed \\(gzip\\).* unpack it"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tars_are_refused(kind: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[kind]
    (tmp_path / "a.tar").write_bytes(make())
    with pytest.raises(DataError, match=reason) as caught:
        photos(tmp_path / "a.tar")
    assert str(tmp_path / "a.tar") in str(caught.value)


def test_sizes_and_double_names(tmp_path: Path) -> None:
    data = tar_of(member("a.jpg", bytes(1001)), member("b.jpg", b"1"), member("b.jpg", b"2"))
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"too large: a/a.jpg has 1001 bytes, limit 1000"):
        photos(tmp_path / "a.tar", max_bytes=1000).read("a")
    with pytest.raises(DataError, match=r"ambiguous: .* has 2 members of the name a/b.jpg"):
        photos(tmp_path / "a.tar").read("b")


def test_members_beyond_a_number_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlal_dist.data.format.photo_tars.MAX_MEMBERS", 3)
    (tmp_path / "a.tar").write_bytes(tar_of(*(member(f"{n}.jpg") for n in range(3))))
    assert len(photos(tmp_path / "a.tar").list_names()) == 3
    (tmp_path / "b.tar").write_bytes(tar_of(member("x.jpg")))
    with pytest.raises(ConfigError, match=r"more than 3 members; give fewer"):
        photos(tmp_path / "*.tar")


def test_a_bucket_s_tar_is_listed_in_large_pieces(moto_s3: S3Server) -> None:
    small = [member(f"{n:03d}.jpg", bytes([n]) * 1000) for n in range(200)]
    large = [member(f"large{n}.jpg", bytes(9 << 20)) for n in range(3)]
    data = tar_of(*small, *large, member("last.jpg", b"last"))
    store = open_store(moto_s3.url())
    assert isinstance(store, S3Store)
    store.create("p/a.tar", data)
    reader = photos(f"{store.url}/p/a.tar")
    used = reader._places[0]._tars[0].store  # type: ignore[attr-defined]
    listing = used.counts
    assert listing.requests <= 8 and listing.bytes_in < 18 << 20, listing
    assert reader.read("007") == bytes([7]) * 1000 and reader.read("last") == b"last"
    assert used.counts.requests == listing.requests + 2
    store.replace("p/a.tar", tar_of(member("other.jpg", b"x" * 1000)))
    with pytest.raises(DataError):
        reader.read("008")


def test_processes_share_the_list_of_a_bucket_s_tar(moto_s3: S3Server, tmp_path: Path) -> None:
    store = open_store(moto_s3.url())
    store.create("a.tar", tar_of(member("a.jpg", b"1"), member("bad\udce9.jpg", b"2")))
    cache = str(tmp_path)

    def requests(reader: Photos) -> int:
        return reader._places[0]._tars[0].store.counts.requests  # type: ignore[attr-defined, no-any-return]

    url = f"{store.url}/a.tar"
    first, second = (photos(url, cache=cache, command="1") for _ in range(2))
    assert (requests(first), requests(second)) == (2, 1)  # its size, its headers
    assert second.list_names() == first.list_names() and second.read("bad\udce9") == b"2"
    store.replace("a.tar", tar_of(member("b.jpg", b"4"), member("c.jpg", b"3")))  # as long
    third = photos(url, cache=cache, command="2")
    assert requests(third) == 2 and third.read("b") == b"4"
    assert len(list((tmp_path / "photos").iterdir())) == 1  # an earlier command's is removed


MEMBERS = {name: name.encode() * 300 for name in ("a.jpg", "sub/b.png", LONG)}
WHOLE = tar_of(*(member(name, data) for name, data in MEMBERS.items()))


def check_any_answer(path: Path) -> None:
    """Members' bytes, or errors of ours."""
    try:
        reader = photos(path)
        names = reader.list_names()
    except (ConfigError, DataError) as error:
        str(error).encode()
        return
    for name in ["a", "b", *MEMBERS, *names]:
        try:
            reader.read(name)
        except DataError as error:
            str(error).encode()


@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(WHOLE) - 1),
            st.sampled_from([b"\0", b"\xff", b"\x80", b"../", b"x", b"g", b"L", b"S"])
            | st.binary(),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_an_edited_tar_gives_bytes_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes, bool]]
) -> None:
    data = bytearray(WHOLE)
    for at, value, inserted in edits:
        data[at : at if inserted else at + len(value)] = value
        block = at // 512 * 512  # a checksum that fits, so that fields are reached
        if len(data) >= block + 512:
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    path = tmp_path_factory.mktemp("edited") / "a.tar"
    path.write_bytes(data)
    check_any_answer(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_mutilated_tars_give_bytes_or_errors(form: int, tmp_path: Path) -> None:
    whole = tar_of(*(member(name, data) for name, data in MEMBERS.items()), form=form)
    for seed in range(100):
        (tmp_path / "a.tar").write_bytes(mutilations(whole, seed))
        check_any_answer(tmp_path / "a.tar")
