"""Saved models: weights as safetensors, and a small JSON that describes them.

`PREFIX/model.safetensors` and `PREFIX/model.json`, the latter written last with the sha256 of the
former, so that an interrupted save is noticed and never loaded. No pickle.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import safetensors.torch
import torch
from torch import nn

from vlal_dist.config.sections import ModelConfig
from vlal_dist.contents import Count, Share, Side, parse_json, shown
from vlal_dist.errors import DataError, NotFoundError, bounded
from vlal_dist.method.model import AttributeClassifier, build_model
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import Store
from vlal_dist.vocabulary import Vocabulary

FORMAT = 1


@dataclass(frozen=True)
class SavedModelInfo:
    """The content of `model.json`.

    Attributes:
        layers: the network; in the file its fields but `weights` stand beside the others.
        num_objects, num_attributes: as `build_model` takes them.
        image_size: input side in pixels.
        normalize: whether inputs had ImageNet's mean subtracted and were divided by its std.
        vocabulary_digest: names and order of objects and attributes.
        feasible_digest: the feasible sets it was trained with; a record, not a condition of use.
        profile, loss, seed: the training configuration's.
        step, epoch: optimizer steps and finished epochs behind these weights.
        validation_map: `mAP` on the validation split, a share of 1; None where it is undefined: of
            such a run the latest model is saved.
    """

    layers: ModelConfig
    num_objects: Count
    num_attributes: Count
    image_size: Side
    normalize: bool
    vocabulary_digest: str
    feasible_digest: str
    profile: str
    loss: str
    seed: Count
    step: Count
    epoch: Count
    validation_map: Share | None

    def to_json(self) -> dict[str, Any]:
        """The values of `model.json`."""
        values = dict(vars(self))
        return {**values.pop("layers").model_dump(exclude={"weights"}), **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: str, remedy: str) -> "SavedModelInfo":
        """The reverse; a DataError where a value is missing or out of range."""
        layers = {name: values[name] for name in ModelConfig.model_fields if name in values}
        others = {field.name: values.get(field.name) for field in fields(cls)[1:]}
        text = json.dumps({"layers": layers, **others})
        return parse_json(text, cls, where=where, remedy=remedy)  # type: ignore[no-any-return]


def encode_weights(model: nn.Module) -> bytes:
    """Parameters and buffers as a safetensors file, from any device; equal weights, equal bytes."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save({name: state[name].contiguous() for name in sorted(state)})


def decode_weights(data: bytes, info: SavedModelInfo, *, where: str) -> AttributeClassifier:
    """The model, on the CPU and in eval mode; DataError, naming `where`, if the two do not fit.

    The shapes that `info` asks for are compared with those of the file before any is allocated.
    """
    wanted = {"num_objects": info.num_objects, "num_attributes": info.num_attributes}
    try:
        tensors = safetensors.torch.load(data)
        with torch.device("meta"):
            expected = build_model(info.layers, **wanted).state_dict()
        for name in sorted(expected.keys() | tensors.keys()):
            found = [
                "absent"
                if one is None
                else f"{str(one.dtype).removeprefix('torch.')} {[*one.shape]}"
                for one in (tensors.get(name), expected.get(name))
            ]
            if found[0] != found[1]:
                raise ValueError(f"{shown(name)} is {found[0]}, expected {found[1]}")
    except Exception as error:  # shapes of others raise any type, OverflowError too
        raise DataError(
            f"{where} does not fit a {info.layers.backbone} for {info.num_objects} objects and "
            f"{info.num_attributes} attributes: {bounded(str(error))}"
        ) from None
    model = build_model(info.layers, **wanted)
    model.load_state_dict(tensors)
    return model.eval()


def write_model(store: Store, prefix: str, weights: bytes, info: SavedModelInfo) -> None:
    """Write the bytes of `encode_weights`, then their JSON; an earlier model is replaced.

    Raises:
        StorageError: a file cannot be written.
    """
    store.replace(f"{prefix}/model.safetensors", weights)
    text = {"format": FORMAT, "sha256": sha256_of(weights), **info.to_json()}
    store.replace(f"{prefix}/model.json", (json.dumps(text, indent=2) + "\n").encode())


def load_saved_model(
    store: Store, prefix: str, *, vocabulary: Vocabulary
) -> tuple[AttributeClassifier, SavedModelInfo]:
    """Read a saved model, on the CPU and in eval mode.

    Args:
        store: root of the run.
        prefix: folder below it, such as `best`.
        vocabulary: of the dataset that the model will see.

    Raises:
        NotFoundError: no model was saved there.
        DataError: another vocabulary (both digests are named), or damaged files.
    """
    where, remedy = f"{store.url}: {prefix}/model.json", "repeat the training command"
    try:
        data = store.read(f"{prefix}/model.json")
    except NotFoundError:
        raise NotFoundError(
            f"{where} does not exist: no model was saved there yet; train until its first "
            "validation, or correct paths.run"
        ) from None
    values = parse_json(data, dict[str, Any], where=where, remedy=remedy)
    if values.get("format") != FORMAT:
        raise DataError(
            f"{where} has format {shown(values.get('format'))}; this version reads {FORMAT}"
        )
    info = SavedModelInfo.from_json(values, where=where, remedy=remedy)
    if info.vocabulary_digest != vocabulary.digest:
        raise DataError(
            f"{where} has vocabulary digest {info.vocabulary_digest}, the dataset has "
            f"{vocabulary.digest}; use the dataset it was trained on, or clean with --like"
        )
    key = f"{prefix}/model.safetensors"
    sha256 = str(values.get("sha256"))
    weights = read_verified(store, key, sha256=sha256, remedy=f"{remedy}, which saves again")
    return decode_weights(weights, info, where=f"{store.url}: {key}"), info


def read_verified(store: Store, key: str, *, sha256: str | None, remedy: str) -> bytes:
    """A file's bytes; DataError, ending in `remedy`, if they have another sha256."""
    data = store.read(key)
    found = sha256_of(data)
    if found != sha256:
        raise DataError(
            f"{store.url}: {key} has sha256 {found}, recorded is {shown(sha256)}: the write was "
            f"interrupted or the file was changed; {remedy}"
        )
    return data
