"""Prediction requests: one object in one photo per row, from a table or from a folder's names.

A row that cannot be used becomes a `Reject` in its place; nothing is guessed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlal_dist.config.sections import PredictConfig
from vlal_dist.data.format.photos import Limits, Photos
from vlal_dist.data.format.tables import cell_text, row_box
from vlal_dist.data.loading.decode import Box
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.release.model import ExportedModel
from vlal_dist.release.tables import Rows, read_table


@dataclass(frozen=True)
class Request:
    """One object in one photo.

    Attributes:
        row: of the table or of the listing, from 0.
        id: the table's, else the row in a table, the name in a folder.
        image: name of the photo; one of a folder may hold bytes that are no text (`os.fsdecode`).
        object_name: as given; None for a model without an object gate.
        object_id: of the model's vocabulary.
        box: x, y, width, height in pixels; None: the whole photo.
    """

    row: int
    id: str
    image: str
    object_name: str | None
    object_id: int
    box: Box | None


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used: the reason in a few words, and what was found."""

    row: int
    id: str
    image: str
    object: str | None
    reason: str
    detail: str


def reject(row: int, id: str, image: str, object_name: str | None, error: DataError) -> Reject:
    """From an error whose text is `reason: detail`."""
    reason, _, detail = str(error).partition(":")
    return Reject(row, id, image, object_name, reason, detail.strip())


def open_requests(
    config: PredictConfig, model: ExportedModel
) -> tuple[Photos, Iterator[Request | Reject], int]:
    """The photos, the requests, and the number of requests (0: not known).

    Raises:
        ConfigError: settings that do not name photos and objects of the model.
        DataError: the table is damaged or lacks `image`; some tables show it only when read.
    """
    if config.object is not None:
        try:
            model.object_id(config.object)
        except DataError as error:
            raise ConfigError(f"predict.object: {error}") from None
    limits = Limits(
        "predict.images", config.max_bytes, config.follow_links, image_column=config.image_column
    )
    if config.table is not None:
        table = Path(config.table)
        rows, total = read_table(table, config.ignore_columns)
        photos = Photos([config.images or str(table.parent)], limits)
        return photos, _parse(rows, config.object, model), total
    if config.images is None:
        raise ConfigError("predict.images and predict.table are absent; give one of them")
    if config.object is None and model.info.model.layers.object_gate:
        raise ConfigError(
            "predict.object is absent: this model needs the name of the object that the "
            "photos show; give it, or a predict.table with the columns image and object"
        )
    photos = Photos([config.images], limits)
    names, object_id = photos.list_names(), model.object_id(config.object)
    requests = (
        Request(row, name, name, config.object, object_id, None) for row, name in enumerate(names)
    )
    return photos, requests, len(names)


def _parse(
    rows: Rows, default_object: str | None, model: ExportedModel
) -> Iterator[Request | Reject]:
    for row, record in rows:
        if isinstance(record, DataError):
            yield reject(row, str(row), "", None, record)
            continue
        texts: dict[str, str | None] = dict.fromkeys(("id", "image", "object"))
        errors: list[DataError] = []
        for column in texts:
            try:
                texts[column] = cell_text(record.get(column), column)
            except DataError as error:
                errors.append(error)
        identity, image = texts["id"] or str(row), texts["image"] or ""
        name = texts["object"] or default_object
        try:
            if errors:
                raise errors[0]
            object_id = model.object_id(name)
            if not image:
                raise DataError("no image: the column image is empty")
            yield Request(row, identity, image, name, object_id, row_box(record))
        except DataError as error:
            yield reject(row, identity, image, name, error)
