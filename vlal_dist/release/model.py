"""An exported model: a folder that loads without dataset, run or configuration.

`model.safetensors`, optionally `thresholds.json` and `model.onnx`, `README.md`, and `config.json`,
committed last with the sha256 of the files above: an export cut in two is never loaded. No pickle.
Three lines use it:

    from vlal_dist.release.model import load_exported
    model = load_exported("runs/vaw/export")
    model("photo.jpg", "dog", top_k=5)
"""

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from vlal_dist.data.format.images import open_photo, upright_rgb
from vlal_dist.data.loading.batch import to_floats
from vlal_dist.data.loading.decode import Box, square_into
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.method.model import AttributeClassifier, build_model
from vlal_dist.release.saved_model import SavedModelInfo
from vlal_dist.release.thresholds import Thresholds, decode_thresholds
from vlal_dist.storage.store import Store, open_store
from vlal_dist.vocabulary import Vocabulary

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
THRESHOLDS, ONNX = "thresholds.json", "model.onnx"
MAX_PIXELS = 64_000_000
"""Largest photo that `ExportedModel` opens by itself (pixels); predict has its own knob."""


@dataclass(frozen=True)
class ExportInfo:
    """What `config.json` says besides digests.

    Attributes:
        model: architecture, input and training of the weights.
        vocabulary: object and attribute names in id order, and the attributes' groups.
        dataset: name of the dataset trained on.
        box_expansion: margin around a box, as its crops were packed with (`crop_bounds`).
    """

    model: SavedModelInfo
    vocabulary: Vocabulary
    dataset: str
    box_expansion: float


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
        info: what the export says of it.
        network: the classifier, in eval mode.
        thresholds: from which probability on an attribute is present; None: not learned.
    """

    def __init__(
        self, info: ExportInfo, network: AttributeClassifier, thresholds: Thresholds | None
    ) -> None:
        self.info, self.network, self.thresholds = info, network.eval(), thresholds

    @torch.inference_mode()
    def __call__(
        self,
        image: Image.Image | Tensor | str | Path,
        object_name: str | None = None,
        *,
        box: Box | None = None,
        top_k: int = 10,
    ) -> list[FoundAttribute]:
        """The likeliest attributes of one object.

        Args:
            image: a photo: of Pillow, uint8 [3, H, W], or the path of a file.
            object_name: one of the vocabulary's; needed unless the model has no object gate.
            box: x, y, width, height in pixels of the upright photo; None: all of it.
            top_k: how many; 0: all.

        Raises:
            DataError: an unknown object, a box outside, no image.
            NotFoundError: no such file.
        """
        object_id = torch.tensor([self.object_id(object_name)])
        side = self.info.model.image_size
        square = np.empty((side, side, 3), dtype=np.uint8)
        expansion = self.info.box_expansion
        square_into(_photo(image), box, square, expansion=expansion, max_pixels=MAX_PIXELS)
        probability = self.probabilities(torch.from_numpy(square[None]), object_id).numpy()
        ids, values, present = self.top(probability, k=top_k)
        names = self.info.vocabulary.attributes
        return [
            FoundAttribute(names[i], value, None if present is None else bool(present[0, place]))
            for place, (i, value) in enumerate(zip(ids[0], values[0].tolist(), strict=True))
        ]

    def object_id(self, name: str | None) -> int:
        """The id of an object name; 0 where the model does not look at objects.

        Raises:
            DataError: no such object; the nearest names are told.
        """
        if not self.info.model.object_gate:
            return 0
        ids = self.info.vocabulary.object_ids
        if name in ids:
            return ids[name]
        if name is None:
            raise DataError("no object: this model needs the object's name beside the image")
        near = difflib.get_close_matches(name, self.info.vocabulary.objects, n=3, cutoff=0.0)
        raise DataError(
            f"unknown object: {name!r}; the nearest of the model's {len(ids)} objects are "
            f"{', '.join(map(repr, near))}"
        )

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

    def top(
        self, probability: npt.NDArray[np.float32], *, k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.bool_] | None]:
        """The k likeliest attributes of each row, best first; ties: lower id.

        Args:
            probability: float32 [B, A].
            k: at most A are given; 0: all.

        Returns:
            Attribute ids [B, k], their probabilities, and whether each reaches its threshold (None
            without thresholds).
        """
        ids = np.argsort(-probability, axis=1, kind="stable")[:, : k or None]
        values = np.take_along_axis(probability, ids, axis=1)
        if self.thresholds is None:
            return ids, values, None
        return ids, values, values >= np.asarray(self.thresholds.value)[ids]


def write_export(
    store: Store, info: ExportInfo, files: dict[str, bytes], *, card: str, remarks: dict[str, Any]
) -> None:
    """Write an export; an earlier one of the same root is replaced, not left half in place.

    Args:
        store: the root.
        info: what it is.
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
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "model": asdict(info.model),
        "dataset": info.dataset,
        "box_expansion": info.box_expansion,
        **remarks,
        "vocabulary": info.vocabulary.to_json(),
    }
    store.replace(CONFIG, (json.dumps(values, indent=1) + "\n").encode())


def load_exported(folder: str | Path) -> ExportedModel:
    """Read an exported model, on the CPU and in eval mode.

    Args:
        folder: written by `python -m vlal_dist.export`; a path or `s3://bucket/prefix`.

    Raises:
        NotFoundError: no export lies there.
        DataError: damaged or altered files, or a format of another version.
    """
    store = open_store(str(folder))
    info, digests = _read_config(store)
    weights = _read_file(store, WEIGHTS, digests)
    model = info.model
    network = build_model(
        depth=model.depth,
        width=model.width,
        num_objects=len(info.vocabulary.objects),
        num_attributes=len(info.vocabulary.attributes),
        object_gate=model.object_gate,
    )
    try:
        network.load_state_dict(safetensors.torch.load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"{store.url}: {WEIGHTS} does not fit {CONFIG}: {error}") from None
    thresholds = None
    if THRESHOLDS in digests:
        data = _read_file(store, THRESHOLDS, digests)
        where = f"{store.url}: {THRESHOLDS}"
        thresholds = decode_thresholds(data, info.vocabulary.attributes, where=where)
    return ExportedModel(info, network, thresholds)


def _read_config(store: Store) -> tuple[ExportInfo, dict[str, str]]:
    where = f"{store.url}: {CONFIG}"
    try:
        values: dict[str, Any] = json.loads(store.read(CONFIG))
    except NotFoundError:
        raise NotFoundError(
            f"{where} does not exist: no model was exported there, or not to the end; run "
            "python -m vlal_dist.export, or correct the folder"
        ) from None
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error}); export again") from None
    if values.get("format") != FORMAT:
        raise DataError(f"{where} has format {values.get('format')}; this version reads {FORMAT}")
    try:
        info = ExportInfo(
            model=SavedModelInfo(**values["model"]),
            vocabulary=Vocabulary.from_json(values["vocabulary"]),
            dataset=str(values["dataset"]),
            box_expansion=float(values["box_expansion"]),
        )
        return info, dict(values["files"])
    except (ValueError, KeyError, TypeError) as error:  # a DataError of the vocabulary included
        raise DataError(f"{where} is damaged ({error}); export again") from None


def _read_file(store: Store, name: str, digests: dict[str, str]) -> bytes:
    data = store.read(name)
    found = hashlib.sha256(data).hexdigest()
    if found != digests.get(name):
        raise DataError(
            f"{store.url}: {name} has sha256 {found}, {CONFIG} says {digests.get(name)}: it was "
            "changed; export again"
        )
    return data


def _photo(image: Image.Image | Tensor | str | Path) -> Image.Image:
    """An upright RGB image of what was given."""
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ConfigError(
                f"a tensor of {image.dtype} {list(image.shape)} was given; an image is uint8 "
                "[3, H, W], RGB"
            )
        return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    path = Path(image)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file; correct the path") from None
    try:
        return open_photo(data, max_pixels=MAX_PIXELS)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
