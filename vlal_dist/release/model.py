"""Exported models: a folder that loads without dataset, run or configuration.

`model.safetensors`, optionally `thresholds.json` and `model.onnx`, `README.md`, and `config.json`,
committed last with the sha256 of the files above, so that an interrupted export is never loaded.
No pickle. Three lines use it:

    import vlal_dist as vlal
    model = vlal.load_model("runs/vaw/export")
    model("photo.jpg", "dog", top_k=5)
"""

import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import TypedDict

from vlal_dist.contents import Colour, Expansion, Sha256, parse_json, shown
from vlal_dist.data.format.images import WHITE, open_photo, upright_rgb
from vlal_dist.data.format.photos import Limits, printable, read_file
from vlal_dist.data.loading.batch import to_floats
from vlal_dist.data.loading.decode import Box, square_into
from vlal_dist.errors import ConfigError, DataError, NotFoundError, StorageError
from vlal_dist.method.model import AttributeClassifier
from vlal_dist.release.saved_model import SavedModelInfo, decode_weights, read_verified
from vlal_dist.release.thresholds import Thresholds, decode_thresholds
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import Store, open_store
from vlal_dist.vocabulary import Vocabulary

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
THRESHOLDS, ONNX = "thresholds.json", "model.onnx"
MAX_PIXELS = 64_000_000
"""Largest photo that `ExportedModel` opens by itself (pixels); `predict.max_pixels` is separate."""

Photo = Image.Image | npt.NDArray[np.uint8] | Tensor | str | Path
"""What `ExportedModel` takes: an image, uint8 [H, W, 3], uint8 [3, H, W], or a file's path."""


class _Config(TypedDict):
    """`config.json` (docs/formats.md)."""

    files: dict[str, Sha256]
    model: dict[str, Any]
    dataset: str
    box_expansion: Expansion
    background: NotRequired[Colour]
    vocabulary: dict[str, Any]


@dataclass(frozen=True)
class ExportInfo:
    """The content of `config.json`, without digests.

    Attributes:
        model: architecture, input and training of the weights.
        vocabulary: object and attribute names in id order, and the attributes' groups.
        dataset: name of the dataset trained on.
        box_expansion: margin around a box, as its crops were packed with (`crop_bounds`).
        background: colour below transparent pixels, likewise; white where none was recorded.
    """

    model: SavedModelInfo
    vocabulary: Vocabulary
    dataset: str
    box_expansion: float
    background: str = WHITE


@dataclass(frozen=True)
class FoundAttribute:
    """An attribute of a crop.

    Attributes:
        name: of the attribute.
        probability: P = sigmoid(z).
        present: whether it reaches the attribute's threshold; None: the model has none.
    """

    name: str
    probability: float
    present: bool | None


class ExportedModel:
    """A model with names: photos and object names in, attribute names and probabilities out.

    Attributes:
        info: the export's description.
        network: the classifier, in eval mode.
        thresholds: from which probability on an attribute is present; None: not learned.
    """

    def __init__(
        self, info: ExportInfo, network: AttributeClassifier, thresholds: Thresholds | None
    ) -> None:
        self.info, self.network, self.thresholds = info, network.eval(), thresholds

    def __call__(
        self,
        image: Photo,
        object_name: str | None = None,
        *,
        box: Box | None = None,
        top_k: int = 10,
    ) -> list[FoundAttribute]:
        """The likeliest attributes of one object.

        Args:
            image: a photo: the path of a file, an image of Pillow, a uint8 array [H, W, 3] or a
                uint8 tensor [3, H, W], RGB.
            object_name: one of the vocabulary's; needed unless the model has no object gate.
            box: x, y, width, height in pixels of the upright photo; None: all of it.
            top_k: how many; 0: all.

        Raises:
            ConfigError: arguments of another type, shape or range; it is a ValueError.
            DataError: an unknown object, a box outside, a file that is no photo.
            NotFoundError: no such file.
        """
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
            raise ConfigError(f"top_k {top_k!r}: give a number of attributes, 0 for all")
        if box is not None:
            box = _checked_box(box)
        object_id = torch.tensor([self.object_id(object_name)])
        side = self.info.model.image_size
        square = np.empty((side, side, 3), dtype=np.uint8)
        expansion = self.info.box_expansion
        photo = _photo(image, self.info.background)
        square_into(photo, box, square, expansion=expansion, max_pixels=MAX_PIXELS)
        return self.top(self.probabilities(torch.from_numpy(square[None]), object_id), k=top_k)[0]

    def object_id(self, name: str | None) -> int:
        """The id of an object name; 0 where the model does not look at objects.

        Raises:
            DataError: no such object; the message names the nearest ones.
        """
        if not self.info.model.layers.object_gate:
            return 0
        if not isinstance(name, str | None):
            raise ConfigError(f"an object is given by its name, as text, not {type(name).__name__}")
        if name is None:
            raise DataError("no object: this model needs the object's name beside the image")
        known = self.info.vocabulary.object_ids
        if name not in known:
            raise DataError(
                f"unknown object: {name!r}; the nearest of the model's {len(known)} objects are "
                f"{_nearest(name, self.info.vocabulary.objects)}"
            )
        return known[name]

    @torch.inference_mode()
    def probabilities(self, squares: Tensor, object_id: Tensor) -> Tensor:
        """P = sigmoid(z) of crops that have the model's size.

        Args:
            squares: uint8 [B, S, S, 3], RGB.
            object_id: int64 [B].

        Returns:
            float32 [B, A], on the CPU.
        """
        device = next(self.network.parameters()).device
        image = to_floats(
            squares.permute(0, 3, 1, 2).to(device), normalize=self.info.model.normalize
        )
        return torch.sigmoid(self.network(image, object_id.to(device)).float()).cpu()

    def top(self, probability: Tensor, *, k: int) -> list[list[FoundAttribute]]:
        """The k likeliest attributes of each row, best first; ties: lower id.

        Args:
            probability: float32 [B, A].
            k: at most A are given; 0: all.
        """
        value = probability.numpy()
        ids = np.argsort(-value, axis=1, kind="stable")[:, : k or None]
        value = np.take_along_axis(value, ids, axis=1)
        present = np.full(ids.shape, None)
        if self.thresholds is not None:
            threshold = [one.value for one in self.thresholds.attributes.values()]
            present = value >= np.asarray(threshold)[ids]
        names = self.info.vocabulary.attributes
        return [
            [FoundAttribute(names[i], p, reached) for i, p, reached in zip(*row, strict=True)]
            for row in zip(ids.tolist(), value.tolist(), present.tolist(), strict=True)
        ]


def write_export(
    store: Store, info: ExportInfo, files: dict[str, bytes], *, card: str, remarks: dict[str, Any]
) -> None:
    """Write an export; an earlier one of the same root is replaced, not left half in place.

    Args:
        store: the root.
        info: its description.
        files: `model.safetensors`, and `thresholds.json`, `model.onnx` where there are any.
        card: text of `README.md`; its owner may edit it, so it has no digest.
        remarks: further keys of `config.json`, for people.
    """
    store.delete(CONFIG)
    for name in (THRESHOLDS, ONNX):
        if name not in files:
            store.delete(name)
    for name, data in files.items():
        store.replace(name, data)
    store.replace("README.md", card.encode())
    values = {
        "format": FORMAT,
        "files": {name: sha256_of(data) for name, data in files.items()},
        "model": info.model.to_json(),
        "dataset": info.dataset,
        "box_expansion": info.box_expansion,
        "background": info.background,
        **remarks,
        "vocabulary": info.vocabulary.to_json(),
    }
    store.replace(CONFIG, (json.dumps(values, indent=1) + "\n").encode())


def load_model(folder: str | Path) -> ExportedModel:
    """Read an exported model, on the CPU and in eval mode (f_a(x, o) of Sec. 2.1).

    Args:
        folder: written by `vlal export`; a path or `s3://bucket/prefix`.

    Returns:
        Names in, names and probabilities out; `.network` is the torch module, to be moved to a GPU
        by `.network.cuda()`.

    Raises:
        ConfigError: not a path or URL.
        NotFoundError: no export lies there.
        DataError: damaged or altered files, or a format of another version.

    Example:
        >>> import vlal_dist as vlal
        >>> model = vlal.load_model("runs/vaw/export")
        >>> found = model("photo.jpg", "ball", top_k=3)  # likeliest first
        >>> len(found), found[0].name in model.info.vocabulary.attributes
        (3, True)
        >>> 0.0 <= found[2].probability <= found[0].probability <= 1.0
        True
    """
    if not isinstance(folder, str | Path):
        raise ConfigError(f"load_model takes a path or URL, not {type(folder).__name__}")
    store = open_store(str(folder))
    info, digests = _read_config(store)

    def read(name: str) -> bytes:
        return read_verified(store, name, sha256=digests.get(name), remedy="export again")

    network = decode_weights(read(WEIGHTS), info.model, where=f"{store.url}: {WEIGHTS}")
    thresholds = None
    if THRESHOLDS in digests:
        where = f"{store.url}: {THRESHOLDS}"
        thresholds = decode_thresholds(read(THRESHOLDS), info.vocabulary.attributes, where=where)
    return ExportedModel(info, network, thresholds)


def _read_config(store: Store) -> tuple[ExportInfo, dict[str, str]]:
    """The description, and the sha256 of each file."""
    where = f"{store.url}: {CONFIG}"
    try:
        data = store.read(CONFIG)
    except NotFoundError:
        raise NotFoundError(
            f"{where} does not exist: no model was exported there, or the export was interrupted; "
            "run vlal export, or correct the folder"
        ) from None
    remedy = "export again"
    values: dict[str, Any] = parse_json(data, dict[str, Any], where=where, remedy=remedy)
    if values.get("format") != FORMAT:
        raise DataError(
            f"{where} has format {shown(values.get('format'))}; this version reads {FORMAT}"
        )
    values = parse_json(data, _Config, where=where, remedy=remedy)
    try:
        vocabulary = Vocabulary.from_json(values["vocabulary"])
    except DataError as error:
        raise DataError(f"{where} is damaged ({error}); {remedy}") from None
    model = SavedModelInfo.from_json(values["model"], where=where, remedy=remedy)
    sizes = (len(vocabulary.objects), len(vocabulary.attributes))
    if sizes != (model.num_objects, model.num_attributes):
        raise DataError(
            f"{where}: the model is for {model.num_objects} objects and {model.num_attributes} "
            f"attributes, the vocabulary has {sizes[0]} and {sizes[1]}; {remedy}"
        )
    info = ExportInfo(
        model,
        vocabulary,
        values["dataset"],
        float(values["box_expansion"]),
        values.get("background", WHITE),
    )
    return info, values["files"]


@functools.lru_cache
def _nearest(name: str, objects: tuple[str, ...]) -> str:
    """Three similar names; cached, since a search takes milliseconds and rows repeat names."""
    near = difflib.get_close_matches(name, objects, n=3, cutoff=0.0)
    return ", ".join(map(repr, near))


def _checked_box(box: object) -> Box:
    """Four numbers; whether they lie in the photo is seen when it is cropped."""
    try:
        if isinstance(box, str | bytes):
            raise TypeError
        x, y, w, h = map(float, box)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"box {shown(box)}: give x, y, width, height in pixels, or None for the whole photo"
        ) from None
    return x, y, w, h


def _photo(image: Photo, background: str) -> Image.Image:
    """The given photo as an upright RGB image, transparent pixels on the background.

    Raises:
        ConfigError: none of the types, dtypes and shapes of `Photo`.
        DataError, NotFoundError: a file that is not there or no photo.
    """
    if isinstance(image, Image.Image):
        if image.width * image.height > MAX_PIXELS:  # a file may be opened but not decoded yet
            raise DataError(f"too large: {image.width}x{image.height} pixels, limit {MAX_PIXELS}")
        try:
            return upright_rgb(image, background=background)
        except DataError:
            raise
        except Exception as error:  # Pillow raises any type on damaged files
            raise DataError(f"truncated or damaged: {error}") from None
    if isinstance(image, Tensor | np.ndarray):
        channels = 0 if isinstance(image, Tensor) else 2
        whole = image.ndim == 3 and image.shape[channels] == 3 and 0 not in image.shape
        if not whole or image.dtype not in (torch.uint8, np.uint8):
            raise ConfigError(
                f"an array of {image.dtype} {list(image.shape)} was given; an image is uint8, RGB: "
                "an array [H, W, 3] or a tensor [3, H, W]"
            )
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, str | Path):
        raise ConfigError(
            f"{type(image).__name__} is no photo; give a path, an image of Pillow, a uint8 array "
            "[H, W, 3] or a uint8 tensor [3, H, W]; bytes: PIL.Image.open(io.BytesIO(data))"
        )
    path = printable(str(image))
    try:
        data = read_file(str(image), Limits(""))
        return open_photo(data, max_pixels=MAX_PIXELS, background=background)
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder; give one photo, or run vlal predict --predict.images {path}"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: no such file; correct the path") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # no permission; a NUL in the path
        raise StorageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
