"""From one instance and its photo to the parts of one sample."""

import json
from dataclasses import dataclass

from PIL import Image

from vlal_dist.data.images import crop_bounds, encode_jpeg, is_plain_jpeg, open_photo
from vlal_dist.data.index import sample_uid
from vlal_dist.data.shards import EncodedSample, encode_sample, sample_key
from vlal_dist.errors import DataError

JPEG_SIDE = 65_500  # pixels; the encoder's limit


@dataclass(frozen=True)
class Instance:
    """One row of `<split>.parquet`: ids as text, box in pixels, labels as sorted attribute ids."""

    instance_id: str
    image_id: str
    object_id: int
    box: tuple[float, float, float, float]
    positive: list[int]
    negative: list[int]


@dataclass(frozen=True)
class CropSettings:
    """What fixes the bytes of a crop; recorded in `dataset.json`."""

    jpeg_quality: int
    box_expansion: float
    max_pixels: int


@dataclass(frozen=True)
class Photo:
    """A photo decoded once for all its instances."""

    data: bytes
    image: Image.Image
    plain_jpeg: bool


def decode_photo(data: bytes, settings: CropSettings) -> Photo:
    """Decode a whole photo; DataError with the reason when it cannot be."""
    image = open_photo(data, max_pixels=settings.max_pixels)
    return Photo(data=data, image=image, plain_jpeg=is_plain_jpeg(data))


def make_sample(
    instance: Instance, photo: Photo, *, dataset_name: str, settings: CropSettings
) -> tuple[int, str, EncodedSample]:
    """Crop, encode, and lay out one sample: uid, key, tar bytes.

    The original file's bytes are kept when it is an upright RGB or grey JPEG and the crop is all
    of it: nothing is lost to a second compression.

    Raises:
        DataError: the box has no size, lies wholly outside the photo, or is beyond any crop.
    """
    image = photo.image
    bounds = crop_bounds(
        instance.box, width=image.width, height=image.height, expansion=settings.box_expansion
    )
    width, height = bounds[2] - bounds[0], bounds[3] - bounds[1]
    if max(width, height) > JPEG_SIDE or width * height > settings.max_pixels:
        raise DataError(f"box too large: a crop of {width}x{height} pixels, see pack.max_pixels")
    whole = bounds == (0, 0, image.width, image.height)
    jpg = (
        photo.data
        if whole and photo.plain_jpeg
        else encode_jpeg(image.crop(bounds), quality=settings.jpeg_quality)
    )
    x, y, w, h = instance.box
    meta = {
        "box_in_crop": [x - bounds[0], y - bounds[1], w, h],
        "image_id": instance.image_id,
        "instance_id": instance.instance_id,
        "negative": instance.negative,
        "object_id": instance.object_id,
        "positive": instance.positive,
    }
    uid = sample_uid(dataset_name, instance.instance_id)
    key = sample_key(instance.instance_id, uid)
    parts = {"jpg": jpg, "json": json.dumps(meta, separators=(",", ":")).encode()}
    return uid, key, encode_sample(key, parts)
