"""Small files in the layouts of Open Images V4 to V7."""

from pathlib import Path

import pytest
from PIL import Image

from shard_tools.importers.openimages import read_openimages
from tests.shard_tools.importers.reading import Found, read_all
from vlal_dist.errors import ConfigError, DataError

FIRST, SECOND = "000002b66c9c498e", "000002b97e5471a0"
NAMES = "LabelName,DisplayName\n/m/01g317,Person\n/m/014j1m,Apple\n/m/04bcr3,Table\n"
ATTRIBUTES = "/m/083vt,Wooden\n/m/02gy9n,Transparent\n"  # V6 has it without a header, too
LABELS = f"""\
ImageID,Source,LabelName,Confidence
{FIRST},verification,/m/014j1m,0
{FIRST},crowdsource-verification,/m/01g317,1
{SECOND},verification,/m/04bcr3,1
{FIRST},verification,/m/04bcr3,1.0
"""
MACHINE = f"""\
ImageID,Source,LabelName,Confidence
{FIRST},machine,/m/014j1m,0.9
{SECOND},machine,/m/01g317,1
"""
BOXES = f"""\
ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside
{FIRST},xclick,/m/04bcr3,1,0.250000,0.750000,0.100000,0.500000,1,0,0,0,-1
{FIRST},xclick,/m/01g317,1,0.000000,1.000000,0.000000,1.000000,0,0,1,0,0
{FIRST},activemil,/m/01g317,1,0.500000,1.000000,0.500000,1.000000,-1,-1,-1,-1,-1
"""
RELATIONSHIPS = f"""\
ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,RelationshipLabel
{FIRST},/m/04bcr3,/m/083vt,0.25,0.75,0.1,0.5,0.25,0.75,0.1,0.5,is
{FIRST},/m/01g317,/m/04bcr3,0.5,1,0.5,1,0.25,0.75,0.1,0.5,at
{SECOND},/m/04bcr3,/m/02gy9n,0.1,0.2,0.1,0.2,0.1,0.2,0.1,0.2,is
"""
ALL = {
    "class-descriptions.csv": NAMES,
    "oidv6-attributes-description.csv": ATTRIBUTES,
    "train-annotations-human-imagelabels.csv": LABELS,
    "train-annotations-machine-imagelabels.csv": MACHINE,
    "oidv6-train-annotations-bbox.csv": BOXES,
    "oidv6-train-annotations-vrd.csv": RELATIONSHIPS,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All files, and two photos."""
    for name, text in ALL.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos")
    return tmp_path


def write_photos(folder: Path) -> None:
    """One of 400 x 200, and one of 300 x 100, turned by its EXIF."""
    Image.new("RGB", (400, 200)).save(folder / f"{FIRST}.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 300)).save(folder / f"{SECOND}.jpg", exif=exif)


def import_files(folder: Path, *words: str, **settings: object) -> Found:
    """Import the files whose names hold one of the words, and both files of names."""
    names = [name for name in ALL if any(word in name for word in (*words, "description"))]
    return read_all(read_openimages, inputs=[str(folder / name) for name in names], **settings)


def test_labels_of_photos(folder: Path) -> None:
    found = import_files(folder, "imagelabels")
    assert [(one.image_id, one.positive, one.negative) for one in found.records] == [
        (FIRST, ("Person", "Table"), ("Apple",)),
        (SECOND, ("Table",), ()),
    ]
    assert {(one.instance_id, one.object_name, one.box) for one in found.records} == {
        ("", "", None)
    }
    assert not found.rejected


def test_boxes_in_pixels_of_the_upright_photo(folder: Path) -> None:
    found = import_files(folder, "bbox", "vrd", photos=str(folder / "photos"))
    assert [
        (one.image_id, one.object_name, one.box, one.positive, one.negative)
        for one in found.records
    ] == [
        (FIRST, "Table", (100, 20, 200, 80), ("occluded", "Wooden"), ("truncated", "depiction")),
        (FIRST, "Person", (200, 100, 200, 100), (), ()),
        (SECOND, "Table", (30, 10, 30, 10), ("Transparent",), ()),
    ]
    assert [(one.line, one.reason) for one in found.rejected] == [(3, "group")]
    assert found.facts["relationships_left_out_all"] == {"at": 1}


def test_chosen_flags(folder: Path) -> None:
    found = import_files(folder, "bbox", photos=str(folder / "photos"), attributes=["IsTruncated"])
    assert [(one.positive, one.negative) for one in found.records] == [
        ((), ("truncated",)),
        ((), ()),
    ]
    with pytest.raises(ConfigError, match="out of IsOccluded, IsTruncated"):
        import_files(folder, "bbox", photos=str(folder / "photos"), attributes=["IsGroupOf"])


def test_labels_and_boxes_of_one_photo(folder: Path) -> None:
    found = import_files(folder, "human-imagelabels", "vrd", photos=str(folder / "photos"))
    assert [(one.image_id, one.object_name) for one in found.records] == [
        (FIRST, ""),
        (FIRST, "Table"),
        (SECOND, ""),
        (SECOND, "Table"),
    ]


def test_photos_without_size(folder: Path) -> None:
    (folder / "photos" / f"{FIRST}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (folder / "photos" / f"{SECOND}.jpg").unlink()
    found = import_files(folder, "vrd", photos=str(folder / "photos"))
    assert not found.records
    assert [(one.line, one.reason, one.id) for one in found.rejected] == [
        (2, "no_size", FIRST),
        (4, "no_size", SECOND),
    ]
    assert "truncated or damaged" in found.rejected[0].detail
    assert "missing" in found.rejected[1].detail


def test_rows_that_cannot_be_used(folder: Path) -> None:
    name = "train-annotations-human-imagelabels.csv"
    with (folder / name).open("a") as file:
        file.write(
            f"{FIRST},verification\n"
            f"{FIRST},verification,/m/nothing,1\n"
            f"{FIRST},verification,/m/01g317,often\n"
            ",verification,/m/01g317,1\n"
            f"{FIRST},verification,/m/01g317,0\n"
        )
    found = import_files(folder, "human-imagelabels")
    assert sorted((one.line, one.reason) for one in found.rejected) == [
        (6, "bad_line"),
        (7, "unknown_name"),
        (8, "bad_number"),
        (9, "bad_id"),
    ]
    # The last row contradicts an earlier one.
    assert (found.records[0].positive, found.records[0].negative) == (("Table",), ("Apple",))


def test_names_instead_of_codes(folder: Path) -> None:
    path = folder / "own.csv"
    path.write_text("ImageID,LabelName,Confidence\na,dog,1\na,cat,0\n")
    (record,) = read_all(read_openimages, inputs=str(path)).records
    assert (record.image_id, record.positive, record.negative) == ("a", ("dog",), ("cat",))


def test_refused_inputs(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"importing\.photos is empty"):
        import_files(folder, "bbox")
    with pytest.raises(ConfigError, match="names alone"):
        import_files(folder)
    (folder / "other.csv").write_text("ImageID,Subset,OriginalURL\n")
    with pytest.raises(DataError, match="no header of Open Images"):
        read_all(read_openimages, inputs=str(folder / "other.csv"))
