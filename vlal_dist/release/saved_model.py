"""The saved model: weights as safetensors, and a small JSON that says what they are.

`PREFIX/model.safetensors` and `PREFIX/model.json`, the latter written last with the sha256 of the
former: a save that was cut in two is noticed, never loaded. No pickle.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.method.model import AttributeClassifier, build_model
from vlal_dist.storage.store import Store
from vlal_dist.vocabulary import Vocabulary

FORMAT = 1


@dataclass(frozen=True)
class SavedModelInfo:
    """What `model.json` says.

    Attributes:
        depth, width, object_gate, num_objects, num_attributes: what `build_model` needs.
        image_size: input side in pixels.
        normalize: whether inputs had ImageNet's mean subtracted and were divided by its std.
        vocabulary_digest: names and order of objects and attributes.
        feasible_digest: the feasible sets it was trained with; a record, not a condition of use.
        profile, loss, seed: the training configuration's.
        step, epoch: optimizer steps and finished epochs behind these weights.
        validation_map: `mAP` on the validation split, a share of 1.
    """

    depth: int
    width: int
    object_gate: bool
    num_objects: int
    num_attributes: int
    image_size: int
    normalize: bool
    vocabulary_digest: str
    feasible_digest: str
    profile: str
    loss: str
    seed: int
    step: int
    epoch: int
    validation_map: float


def save_model(store: Store, prefix: str, model: nn.Module, info: SavedModelInfo) -> None:
    """Write weights, then their JSON; an earlier model of the same prefix is replaced.

    Args:
        store: root of the run.
        prefix: folder below it, such as `best`.
        model: parameters and buffers are written as they are, from any device.
        info: its description.
    """
    write_model(store, prefix, encode_weights(model), info)


def write_model(store: Store, prefix: str, weights: bytes, info: SavedModelInfo) -> None:
    """`save_model` of `encode_weights`' bytes; StorageError if a file cannot be written."""
    store.replace(f"{prefix}/model.safetensors", weights)
    text = {"format": FORMAT, "sha256": hashlib.sha256(weights).hexdigest(), **asdict(info)}
    store.replace(f"{prefix}/model.json", (json.dumps(text, indent=2) + "\n").encode())


def encode_weights(model: nn.Module) -> bytes:
    """Parameters and buffers as a safetensors file, from any device; equal weights, equal bytes."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save({name: state[name].contiguous() for name in sorted(state)})


def load_model(
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
    where = f"{store.url}: {prefix}/model"
    info, sha256 = _read_info(store, prefix)
    if info.vocabulary_digest != vocabulary.digest:
        raise DataError(
            f"{where}.json has vocabulary digest {info.vocabulary_digest}, the dataset has "
            f"{vocabulary.digest}; use the dataset it was trained on, or clean with --like"
        )
    weights = store.read(f"{prefix}/model.safetensors")
    found = hashlib.sha256(weights).hexdigest()
    if found != sha256:
        raise DataError(
            f"{where}.safetensors has sha256 {found}, model.json says {sha256}: a save was cut in "
            "two or a file was changed; repeat the training command, which resumes and saves again"
        )
    model = build_model(
        depth=info.depth,
        width=info.width,
        num_objects=info.num_objects,
        num_attributes=info.num_attributes,
        object_gate=info.object_gate,
    )
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise DataError(
            f"{where}.safetensors does not fit a depth-{info.depth} model: {error}"
        ) from None
    return model.eval(), info


def _read_info(store: Store, prefix: str) -> tuple[SavedModelInfo, str]:
    """The description and the weights' sha256."""
    where = f"{store.url}: {prefix}/model.json"
    try:
        values = json.loads(store.read(f"{prefix}/model.json"))
        version, sha256 = values["format"], str(values["sha256"])
        info = SavedModelInfo(
            **{field.name: values[field.name] for field in fields(SavedModelInfo)}
        )
    except NotFoundError:
        raise NotFoundError(
            f"{where} does not exist: no model was saved there yet; train until its first "
            "validation, or correct paths.run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is damaged ({error}); repeat the training command") from None
    if version != FORMAT:
        raise DataError(f"{where} has format {version}; this version reads {FORMAT}")
    return info, sha256
