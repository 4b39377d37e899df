"""CUB-200-2011: a folder of text files, 312 attributes of birds with the annotators' certainty.

Fields are separated by blanks. Facts of the real files:

- `images.txt`: image id, path below `images/` (one folder per species).
- `attributes/image_attribute_labels.txt`, 3,677,856 lines: image id, attribute id, is_present (1 or
  0), certainty id, seconds. Some lines of the images 2275 and 9364 hold a sixth field before the
  seconds; the first four mean the same there.
- `attributes/certainties.txt`: 1 not visible, 2 guessing, 3 probably, 4 definitely.
- `attributes.txt`: attribute id, name such as `has_wing_color::red`. The archive has it beside the
  folder CUB_200_2011, its README names it in `attributes/`.
- `bounding_boxes.txt`: image id, x, y, width, height in pixels; one box per image.
- `train_test_split.txt`: image id, 1 for training, 0 for test. There is no validation split.
- `classes.txt` (class id, `001.Black_footed_Albatross`), `image_class_labels.txt` (image id, class
  id).

The object is `bird`: attributes hold for all species, and a species' name would give them away;
`importing.columns {object: class}` takes the species all the same. The labels are held in memory.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from shard_tools.clean.names import name_problem
from shard_tools.importers.records import Box, Item, Notes, Record, Rejected
from vlal_dist.config.sections import ImportConfig
from vlal_dist.contents import shown
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.storage.store import read_url

FOLDER = "CUB_200_2011"
"""The archive's folder; the folder above it is taken too."""
LABELS = "attributes/image_attribute_labels.txt"
ATTRIBUTES = ("attributes/attributes.txt", "attributes.txt", "../attributes.txt")
"""Places of the list of attributes, in the order tried."""
SPLITS = {"1": "train", "0": "test"}
OBJECT = "bird"
CERTAINTIES = {"1": 1, "2": 2, "3": 3, "4": 4}
NOT_VISIBLE, PROBABLY = 1, 3
FIELDS = (5, 6)
"""Numbers of fields of a line of labels."""

RULES = {
    "cub.certainty": "labels whose certainty is below importing.min_certainty are unknown (1 not "
    "visible, 2 guessing, 3 probably, 4 definitely); not visible is unknown always",
    "cub.workers": "labels that contradict each other on one image are unknown",
    "cub.object": "bird; with importing.columns {object: class} the name of the species",
    "cub.split": "train_test_split.txt: 1 train, 0 test; a given importing.split overrides it",
}
"""Name -> rule, for import.json."""

Value = TypeVar("Value")
Labels = dict[str, bool | None]
"""Attribute -> present, absent, or None where labels contradict each other."""


def read_cub(settings: ImportConfig) -> Iterator[Item]:
    """Read a folder CUB_200_2011: one object per photo, in the order of images.txt.

    Lines of other lists that cannot be read are rejected, and so is an image that such a list lacks
    then. Without bounding_boxes.txt an object is the whole photo.

    Raises:
        ConfigError: importing.columns names another object than `class`.
        DataError: a file is absent.
    """
    kind = settings.columns.get("object")
    if kind not in (None, "class"):
        raise ConfigError(
            f"importing.columns.object is {kind!r}; of a CUB folder it is `class` (the species), "
            "or left out (every object is a bird)"
        )
    facts = {"rules": RULES, "min_certainty": _min_certainty(settings)}
    photos: list[str] = []
    for split, urls in settings.inputs.items():
        for url in urls:
            folder = _folder(url)
            photos.append(f"{folder}/images")
            yield from _read_folder(folder, split, species=kind is not None, settings=settings)
    yield Notes(facts, {} if settings.photos else {"pack.images": photos})


def _min_certainty(settings: ImportConfig) -> float:
    return PROBABLY if settings.min_certainty is None else settings.min_certainty


def _read_folder(
    folder: str, split: str, *, species: bool, settings: ImportConfig
) -> Iterator[Item]:
    rejects: list[Rejected] = []
    images = _table(f"{folder}/images.txt", _image_name, rejects)
    boxes = _table(f"{folder}/bounding_boxes.txt", _box, rejects, optional=True)
    objects = _species(folder, rejects) if species else dict.fromkeys(images or (), OBJECT)
    splits: Mapping[str, str] = dict.fromkeys(images, split)
    if split == "all" and "split" not in settings.model_fields_set:
        splits = _table(f"{folder}/train_test_split.txt", SPLITS.get, rejects)
    labels = _labels(folder, images, rejects, _min_certainty(settings))
    yield from rejects
    lacking: dict[str, Mapping[str, object]] = {
        "train_test_split.txt": splits,
        "image_class_labels.txt": objects,
    }
    if boxes:
        lacking["bounding_boxes.txt"] = boxes
    for image_id, name in images.items():
        without = [file for file, table in lacking.items() if image_id not in table]
        if without:
            detail = f"image {shown(image_id)} has no usable line in {' and '.join(without)}"
            yield Rejected("images.txt", 0, image_id, "missing_line", detail)
            continue
        found = labels.get(image_id, {})
        yield Record(
            split=splits[image_id],
            image_id=name,
            instance_id=image_id,
            object_name=objects[image_id],
            box=boxes[image_id] if boxes else None,
            positive=tuple(name for name, value in found.items() if value is True),
            negative=tuple(name for name, value in found.items() if value is False),
            file="images.txt",
        )


def _folder(url: str) -> str:
    """The folder that holds images.txt: the input or CUB_200_2011 in it."""
    for folder in (url.rstrip("/"), f"{url.rstrip('/')}/{FOLDER}"):
        try:
            read_url(f"{folder}/images.txt")
        except NotFoundError:
            continue
        return folder
    raise DataError(
        f"importing.inputs: {url} holds no images.txt, nor does {FOLDER} in it; give the folder "
        f"{FOLDER} of the unpacked archive"
    )


def _lines(url: str, *, optional: bool = False) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line that is not blank; bytes that are no UTF-8 escaped."""
    try:
        data = read_url(url)
    except NotFoundError:
        if optional:
            return
        raise DataError(
            f"importing.inputs: {url} does not exist; it is part of CUB-200-2011's archive: "
            "unpack it whole"
        ) from None
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text, start=1):
        if line.strip():
            yield number, line


def _table(
    url: str,
    parse: Callable[[str], Value | None],
    rejects: list[Rejected],
    *,
    optional: bool = False,
) -> dict[str, Value]:
    """Id -> what `parse` makes of the rest of its line; lines without a value are rejected."""
    table: dict[str, Value] = {}
    for number, line in _lines(url, optional=optional):
        key, _, rest = line.strip().partition(" ")
        value = parse(rest.strip()) if key.isascii() and key.isdigit() else None
        if value is None:
            rejects.append(_bad_line(url, number, line))
        elif key in table:
            detail = f"the id {shown(key)} has an earlier line"
            rejects.append(Rejected(_base(url), number, _id_of(line), "repeated_id", detail))
        else:
            table[key] = value
    return table


def _bad_line(url: str, number: int, line: str) -> Rejected:
    return Rejected(_base(url), number, _id_of(line), "bad_line", shown(line.strip(), most=80))


def _base(url: str) -> str:
    return url.rpartition("/")[2]


def _id_of(line: str) -> str:
    key = line.split(maxsplit=1)[0][:20]
    return key if key.isascii() and key.isdigit() else ""


def _image_name(text: str) -> str | None:
    return None if name_problem(text) else text


def _box(text: str) -> Box | None:
    try:
        x, y, width, height = map(float, text.split())
    except ValueError:
        return None
    usable = all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0
    return (x, y, width, height) if usable else None


def _species(folder: str, rejects: list[Rejected]) -> dict[str, str]:
    classes = _table(f"{folder}/classes.txt", _image_name, rejects)
    return _table(f"{folder}/image_class_labels.txt", classes.get, rejects)


def _attributes(folder: str, rejects: list[Rejected]) -> dict[str, str]:
    for place in ATTRIBUTES:
        parent, inside = folder.rpartition("/")[0] or ".", f"{folder}/{place}"
        url = f"{parent}/{place[3:]}" if place.startswith("../") else inside
        found = _table(url, _image_name, rejects, optional=True)
        if found:
            return found
    raise DataError(
        f"importing.inputs: {folder} has no list of attributes, tried {', '.join(ATTRIBUTES)}; "
        "attributes.txt is in CUB-200-2011's archive, beside the folder: put it there"
    )


def _labels(
    folder: str, images: Mapping[str, str], rejects: list[Rejected], min_certainty: float
) -> dict[str, Labels]:
    """Image id -> its labels of sufficient certainty."""
    url = f"{folder}/{LABELS}"
    attributes = _attributes(folder, rejects)
    labels: dict[str, Labels] = {}
    for number, line in _lines(url):
        fields = line.split()
        if (
            len(fields) not in FIELDS
            or fields[0] not in images
            or fields[1] not in attributes
            or fields[2] not in SPLITS
            or fields[3] not in CERTAINTIES
        ):
            rejects.append(_bad_line(url, number, line))
            continue
        certainty = CERTAINTIES[fields[3]]
        if certainty < min_certainty or certainty == NOT_VISIBLE:
            continue
        of_image, name = labels.setdefault(fields[0], {}), attributes[fields[1]]
        present = fields[2] == "1"
        of_image[name] = present if of_image.get(name, present) is present else None
    return labels
