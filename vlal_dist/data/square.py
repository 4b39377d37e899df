"""From a photo and a box to the square of pixels that a model sees, without a dataset between.

The way of pack and of training but for one step: pack stores a crop as a JPEG of quality 95, and
here its pixels are squashed at once. A whole photo that is an upright JPEG is stored as it is, so
for it nothing differs.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlal_dist.data.decode import resize_into
from vlal_dist.data.images import crop_bounds
from vlal_dist.errors import DataError

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]


def square_into(
    image: Image.Image, box: Box | None, out: Pixels, *, expansion: float, max_pixels: int
) -> None:
    """Crop as pack does, and squash.

    Args:
        image: upright RGB (`open_photo`).
        box: x, y, width, height in pixels of it; None: all of it.
        out: uint8 [S, S, 3], contiguous; written.
        expansion: as in `crop_bounds`.
        max_pixels: of the crop, which may be larger than the photo.

    Raises:
        DataError: the box has no size, lies wholly outside the photo, or is too large.
    """
    if box is not None:
        left, top, right, bottom = crop_bounds(
            box, width=image.width, height=image.height, expansion=expansion
        )
        if (right - left) * (bottom - top) > max_pixels:
            raise DataError(
                f"box too large: a crop of {right - left}x{bottom - top} pixels, limit {max_pixels}"
            )
        image = image.crop((left, top, right, bottom))
    resize_into(np.array(image), out)  # a copy: torch warns of memory that it must not write
