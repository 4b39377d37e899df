"""CLIP: open_clip's image and text encoders, to unit vectors.

The only importer of open_clip. Weights come from a local `.safetensors` file, or from an open_clip
tag that open_clip itself finds in its cache or downloads. Every call has one fixed batch shape, the
last batch padded, so that a row's bits do not depend on how many rows came with it.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vlal_dist.config.sections import ScoringConfig
from vlal_dist.errors import ConfigError


@dataclass
class PhaseSeconds:
    """Where the time of a shard went; summed over threads that run side by side.

    Attributes:
        fetch, decode: reading crops from the store; JPEG to the encoder's input.
        copy, encode: gathering a batch on the device; the encoder, until its vectors are here.
        write: similarities, and the commit of the file.
    """

    fetch: float = 0.0
    decode: float = 0.0
    copy: float = 0.0
    encode: float = 0.0
    write: float = 0.0

    def __add__(self, other: "PhaseSeconds") -> "PhaseSeconds":
        return PhaseSeconds(*map(sum, zip(astuple(self), astuple(other), strict=True)))


Embedding = npt.NDArray[np.float32]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ClipEncoder:
    """Encodes crops and prompts of one loaded model; no gradient, evaluation mode.

    Args:
        model: an open_clip model holding its weights in float32.
        tokenizer: list of texts -> int64 [n, context].
        preprocess: the model's own preprocessing, PIL image -> float32 [3, S, S].
        preprocessing: what `preprocess` does, as plain values (for the digest).
        scoring: `precision`, the arithmetic inside the encoders (weights, normalisation and results
            are float32), and `compile`.
        device: cpu or cuda.
        batch_size: crops or prompts per call; may be set once the best is known.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Any,
        preprocessing: dict[str, object],
        scoring: ScoringConfig,
        *,
        device: str,
        batch_size: int,
    ) -> None:
        self.weights_digest = state_digest(model.state_dict())
        self.preprocessing_digest = hashlib.sha256(
            json.dumps(preprocessing, sort_keys=True).encode()
        ).hexdigest()
        # Convolutions over pixels side by side; the same for a transformer, which has one.
        self.model = model.to(device, memory_format=torch.channels_last).eval()
        self.model.requires_grad_(False)
        self._encode_image, self._encode_text = self.model.encode_image, self.model.encode_text
        if scoring.compile:
            self._encode_image = torch.compile(self._encode_image)
            self._encode_text = torch.compile(self._encode_text)
        self._staging: torch.Tensor | None = None
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.precision, self.device, self.batch_size = scoring.precision, device, batch_size

    @property
    def temperature(self) -> float:
        """The model's own tau of Eq. (2): 1 / exp(logit_scale); 0.01 for OpenAI's CLIP."""
        return math.exp(-float(self.model.logit_scale.detach().reshape(-1)[0]))

    def prepare(self, crop: Image.Image) -> torch.Tensor:
        """Preprocess one RGB crop to float32 [3, S, S]; safe in many threads."""
        pixels: torch.Tensor = self.preprocess(crop)
        return pixels

    def encode_batch(self, pixels: Sequence[torch.Tensor], *, seconds: PhaseSeconds) -> Embedding:
        """Unit-length float32 [n, D] of n <= `batch_size` preprocessed crops, in one call.

        Not thread-safe: the crops are gathered in memory that is used again.
        """
        started = time.perf_counter()
        batch = self._gather(pixels)
        copied = time.perf_counter()
        vectors: Embedding = self._unit_vectors(self._encode_image, batch)[: len(pixels)]
        seconds.copy += copied - started
        seconds.encode += time.perf_counter() - copied
        return vectors

    def encode_texts(self, texts: Sequence[str]) -> Embedding:
        """Unit-length float32 [n, D] of n texts; longer ones than the context are cut."""
        tokens, batches = self.tokenizer(list(texts)), []
        for start in range(0, len(tokens), self.batch_size):
            some = tokens[start : start + self.batch_size]
            padded = torch.zeros(self.batch_size, *some.shape[1:], dtype=some.dtype)
            padded[: len(some)] = some
            vectors = self._unit_vectors(self._encode_text, padded.to(self.device))
            batches.append(vectors[: len(some)])
        return np.concatenate(batches)

    def _gather(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """The crops as one batch on the device, missing rows zero."""
        shape = (self.batch_size, *pixels[0].shape)
        if self._staging is None or self._staging.shape != shape:
            # Page-locked, so that the copy to a GPU is not made twice.
            self._staging = torch.zeros(shape, pin_memory=self.device == "cuda")
        torch.stack(list(pixels), out=self._staging[: len(pixels)])
        self._staging[len(pixels) :] = 0
        staged = self._staging.to(self.device, non_blocking=True)
        return staged.contiguous(memory_format=torch.channels_last)

    def _unit_vectors(self, encode: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
        dtype = AUTOCAST.get(self.precision)
        with (
            torch.inference_mode(),
            torch.autocast(self.device, dtype=dtype, enabled=dtype is not None),
            # The same algorithm on every call, and no TF32 in fp32.
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            vectors = encode(batch)
        vectors = vectors.float()
        return (vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)).cpu().numpy()


def load_clip(scoring: ScoringConfig, *, device: str, batch_size: int = 1) -> ClipEncoder:
    """Load a model by open_clip name; needs no network for local weights.

    Args:
        scoring: `model`, `model_config_dir`, `weights`, `precision`, `compile`.
        device: cpu or cuda.
        batch_size: crops or prompts per encoder call.

    Raises:
        ConfigError: unknown model, absent weights, weights of another model.
    """
    import open_clip  # pulls in torchvision and timm: two seconds that `--help` need not wait for

    model, weights = scoring.model, scoring.weights
    if scoring.model_config_dir is not None:
        open_clip.add_model_config(check_model_config(model, Path(scoring.model_config_dir)))
    if model not in open_clip.list_models():
        raise ConfigError(
            f"scoring.model {model!r} is no open_clip model; give a name of "
            "open_clip.list_models(), or scoring.model_config_dir with MODEL.json"
        )
    check_weights(model, weights, tags=open_clip.list_pretrained_tags_by_model(model))
    root = logging.getLogger()
    level = root.level
    root.setLevel(max(level, logging.WARNING))  # open_clip reports each step of loading there
    try:
        net, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=weights, precision="fp32", device="cpu"
        )
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # open_clip and its hubs raise errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"scoring.weights {weights} cannot be loaded into {model}: {reason}; give the "
            ".safetensors file of this very model (and scoring.model_config_dir if it is your own)"
        ) from None
    finally:
        root.setLevel(level)
    return ClipEncoder(
        net,
        tokenizer,
        preprocess,
        open_clip.get_model_preprocess_cfg(net),
        scoring,
        device=device,
        batch_size=batch_size,
    )


def check_model_config(model: str, folder: Path) -> Path:
    """The model's own JSON file in `folder`, checked.

    Raises:
        ConfigError: absent, damaged, or without the parts of a model config.
    """
    path = folder / f"{model}.json"
    try:
        values = json.loads(path.read_bytes())
        lacking = {"embed_dim", "vision_cfg", "text_cfg"} - set(values)
        problem = f"lacks {', '.join(sorted(lacking))}" if lacking else None
    except (OSError, ValueError, TypeError) as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise ConfigError(
            f"scoring.model_config_dir: {path} {problem}; give the folder that holds {model}.json, "
            "or leave it out for a model that open_clip ships"
        )
    return path


def check_weights(model: str, weights: str | None, *, tags: Sequence[str]) -> None:
    """Refuse absent weights, and files that could hold code.

    Raises:
        ConfigError: not given, no such file and no such tag, or not `.safetensors`.
    """
    remedy = "give scoring.weights FILE.safetensors" + (
        f", or one of open_clip's tags of this model: {', '.join(tags)}" if tags else ""
    )
    if weights is None:
        raise ConfigError(f"scoring.weights is not set, and {model} needs weights; {remedy}")
    if weights in tags:
        return
    if not Path(weights).is_file():
        raise ConfigError(f"scoring.weights {weights}: no such file; {remedy}")
    if Path(weights).suffix != ".safetensors":
        raise ConfigError(
            f"scoring.weights {weights} is not a .safetensors file; other formats can hold code: "
            "convert it first"
        )


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 (hex) over name, dtype, shape and bytes of every tensor, by sorted name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
