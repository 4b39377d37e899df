"""A small folder in CUB-200-2011's layout, with its irregular lines."""

from pathlib import Path

import pytest

from shard_tools.importers.cub import read_cub
from tests.shard_tools.importers.reading import read_all
from vlal_dist.errors import ConfigError, DataError

FILES = {
    "images.txt": """\
1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
2 001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg
2275 038.Great_Crested_Flycatcher/Great_Crested_Flycatcher_0118_29.jpg
""",
    "classes.txt": "1 001.Black_footed_Albatross\n38 038.Great_Crested_Flycatcher\n",
    "image_class_labels.txt": "1 1\n2 1\n2275 38\n",
    "train_test_split.txt": "1 0\n2 1\n2275 1\n",
    "bounding_boxes.txt": """\
1 60.0 27.0 325.0 304.0
2 139.0 30.0 153.0 264.0
2275 14.0 112.0 388.0 186.0
""",
    "attributes/attributes.txt": """\
1 has_bill_shape::curved_(up_or_down)
2 has_bill_shape::dagger
3 has_wing_color::red
""",
    "attributes/certainties.txt": "1 not visible\n2 guessing\n3 probably\n4 definitely\n",
    "attributes/image_attribute_labels.txt": """\
1 1 0 3 27.7080
1 2 1 4 27.7080
1 3 0 1 27.7080
2 1 1 2 12.1
2 2 1 3 12.1
2 3 0 4 12.1
2275 1 0 3 0  1.509
2275 2 1 4 0  1.509
2275 3 0 1 0  1.509
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder CUB_200_2011."""
    for name, text in FILES.items():
        path = tmp_path / "CUB_200_2011" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "CUB_200_2011"


def test_labels_of_sufficient_certainty(folder: Path) -> None:
    found = read_all(read_cub, inputs=str(folder))
    assert [(one.split, one.instance_id, one.positive, one.negative) for one in found.records] == [
        ("test", "1", ("has_bill_shape::dagger",), ("has_bill_shape::curved_(up_or_down)",)),
        ("train", "2", ("has_bill_shape::dagger",), ("has_wing_color::red",)),
        ("train", "2275", ("has_bill_shape::dagger",), ("has_bill_shape::curved_(up_or_down)",)),
    ]
    assert not found.rejected
    first = found.records[0]
    assert first.image_id == "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"
    assert first.object_name == "bird"
    assert first.box == (60.0, 27.0, 325.0, 304.0)
    assert found.settings == {"pack.images": [f"{folder}/images"]}
    assert found.facts["min_certainty"] == 3


@pytest.mark.parametrize(("certainty", "labels"), [(4, 3), (3, 6), (2, 7), (1, 7), (0, 7)])
def test_not_visible_is_unknown_always(folder: Path, certainty: int, labels: int) -> None:
    found = read_all(read_cub, inputs=str(folder), min_certainty=certainty)
    assert sum(len(one.positive + one.negative) for one in found.records) == labels


def test_list_of_attributes_beside_the_folder(folder: Path) -> None:
    (folder / "attributes" / "attributes.txt").rename(folder.parent / "attributes.txt")
    found = read_all(read_cub, inputs=str(folder.parent))  # the folder above is taken too
    assert [len(one.positive) for one in found.records] == [1, 1, 1]


def test_species_as_objects(folder: Path) -> None:
    found = read_all(read_cub, inputs=str(folder), columns={"object": "class"})
    assert found.records[2].object_name == "038.Great_Crested_Flycatcher"
    with pytest.raises(ConfigError, match="it is `class`"):
        read_all(read_cub, inputs=str(folder), columns={"object": "genus"})


def test_another_division(folder: Path) -> None:
    assert {one.split for one in read_all(
        read_cub, inputs=str(folder), split="70/10/20").records} == {"all"}  # fmt: skip
    assert {one.split for one in read_all(
        read_cub, inputs={"test": [str(folder)]}).records} == {"test"}  # fmt: skip


def test_lines_that_cannot_be_read(folder: Path) -> None:
    labels = folder / "attributes" / "image_attribute_labels.txt"
    with labels.open("a") as file:
        file.write("2 9 1 4 1.0\n2 1 yes 4 1.0\n1 2 0 4 1.0\n\n1 2\n")
    (folder / "bounding_boxes.txt").write_text("1 60.0 27.0 0 304.0\n2 1 2 3 4\n2 1 2 3 4\n")
    found = read_all(read_cub, inputs=str(folder))
    assert [(one.file, one.line, one.reason) for one in found.rejected] == [
        ("bounding_boxes.txt", 1, "bad_line"),
        ("bounding_boxes.txt", 3, "repeated_id"),
        ("image_attribute_labels.txt", 10, "bad_line"),
        ("image_attribute_labels.txt", 11, "bad_line"),
        ("image_attribute_labels.txt", 14, "bad_line"),
        ("images.txt", 0, "missing_line"),
        ("images.txt", 0, "missing_line"),
    ]
    assert [one.instance_id for one in found.records] == ["2"]


def test_contradicting_workers_leave_a_label_unknown(folder: Path) -> None:
    with (folder / "attributes" / "image_attribute_labels.txt").open("a") as file:
        file.write("1 2 0 4 1.0\n1 2 1 4 1.0\n")
    found = read_all(read_cub, inputs=str(folder))
    assert found.records[0].positive == ()


def test_whole_photos_without_boxes(folder: Path) -> None:
    (folder / "bounding_boxes.txt").unlink()
    assert {one.box for one in read_all(read_cub, inputs=str(folder)).records} == {None}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images.txt", "holds no images.txt"),
        ("train_test_split.txt", "train_test_split.txt does not exist"),
        ("attributes/attributes.txt", "no list of attributes"),
        ("attributes/image_attribute_labels.txt", "image_attribute_labels.txt does not exist"),
    ],
)
def test_absent_files(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=message):
        read_all(read_cub, inputs=str(folder))
