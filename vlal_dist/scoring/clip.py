"""CLIP: open_clip's image and text encoders, to unit vectors.

The only importer of open_clip. Weights come from a local `.safetensors` file, from an open_clip tag
that open_clip itself finds in its cache or downloads, or with the model's own files from a folder
(`local-dir:`) or Hugging Face's hub (`hf-hub:`). Every call has one fixed batch shape, the
last batch padded, so that a row's bits do not depend on how many rows came with it.
"""

import hashlib
import http.client
import json
import logging
import math
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vlal_dist.config.sections import ScoringConfig
from vlal_dist.errors import ConfigError, require_modules


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

_TEXTS = 4096
"""Texts per call of the tokenizer."""

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
        architecture: the model in a scorer's identity, see `architecture`.
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
        architecture: str,
    ) -> None:
        self.architecture = architecture
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

    @property
    def context_length(self) -> int:
        """Tokens of a text that the model reads, those of its start and end included."""
        return int(self.tokenizer.context_length)

    def tokens(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens of n texts: int64 [n, context]; and bool [n], which of them are cut."""
        ids = np.concatenate(
            [
                self.tokenizer(list(texts[start : start + _TEXTS])).numpy()
                for start in range(0, len(texts), _TEXTS)
            ]
        )
        pad = np.bincount(self.tokenizer([""])[0].numpy()).argmax()
        # Full rows may be cut: then they have more tokens in a longer context.
        cut = (ids[:, -2:] != pad).all(axis=1)
        for place in np.flatnonzero(cut).tolist():
            more = self.tokenizer([texts[place]], context_length=self.context_length + 8)[0].numpy()
            cut[place] = (more != pad).sum() > (ids[place] != pad).sum()
        return ids, cut

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
        units = (vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)).cpu().numpy()
        if not np.isfinite(units).all():
            raise ConfigError(
                "the model's vectors are not finite (NaN, infinity, or length 0) in "
                f"scoring.precision {self.precision}; "
                + (
                    "repeat with scoring.precision fp32"
                    if self.precision != "fp32"
                    else "its weights are broken or of another architecture: give other "
                    "scoring.weights"
                )
            )
        return units


def load_clip(scoring: ScoringConfig, *, device: str, batch_size: int = 1) -> ClipEncoder:
    """Load a model by open_clip name; needs no network for local weights.

    Args:
        scoring: `model`, `model_config_dir`, `weights`, `precision`, `compile`.
        device: cpu or cuda.
        batch_size: crops or prompts per encoder call.

    Raises:
        ConfigError: unknown model, absent or broken weights, weights of another model, a package
            that the model needs and that is not installed.
    """
    import open_clip  # pulls in torchvision and timm: two seconds that `--help` need not wait for

    model, weights = scoring.model, scoring.weights
    bundled = model.startswith((FOLDER, HUB))
    if bundled:
        check_bundled(scoring)
    else:
        if scoring.model_config_dir is not None:
            open_clip.add_model_config(check_model_config(model, Path(scoring.model_config_dir)))
        if model not in open_clip.list_models():
            raise ConfigError(
                f"scoring.model {model!r} is no open_clip model; give a name of "
                "open_clip.list_models(), scoring.model_config_dir with MODEL.json, "
                f"{FOLDER}FOLDER or {HUB}ORGANISATION/NAME"
            )
        check_weights(model, weights, tags=open_clip.list_pretrained_tags_by_model(model))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)  # open_clip reports each step of loading there, and its errors
    repository, part = _repository(scoring), "weights"
    with answering_hub(wanted=repository is not None) as answers:
        try:
            config = open_clip.get_model_config(model)
            check_packages(model, config["text_cfg"])
            net, _, preprocess = open_clip.create_model_and_transforms(
                model, pretrained=weights, precision="fp32", device="cpu", require_pretrained=True
            )
            part = "tokenizer"
            tokenizer = open_clip.get_tokenizer(model)
        except ConfigError:
            raise
        except Exception as error:  # open_clip and its hubs raise errors of many kinds
            absent = None if answers else repository
            raise _cannot_load(scoring, part, error, repository=absent) from None
        finally:
            root.setLevel(level)
    source = model if bundled else f"scoring.weights {weights}"
    if (broken := _not_finite(net)) is not None:
        raise ConfigError(
            f"{source}: {broken} holds NaN or infinity, so nothing can be scored with it; give "
            "whole weights (download or convert them again)"
        )
    return ClipEncoder(
        net,
        tokenizer,
        preprocess,
        open_clip.get_model_preprocess_cfg(net),
        scoring,
        architecture=architecture(model, config, tokenizer),
        device=device,
        batch_size=batch_size,
    )


FOLDER, HUB = "local-dir:", "hf-hub:"
"""Prefixes of open_clip for models that bring config, weights and tokenizer: a folder, or a
repository of Hugging Face's hub."""

PREFERRED = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
"""Weights that open_clip takes first from a folder."""

HUB_S = 5.0
"""Seconds in which the hub must answer; its own client takes a minute to give up."""


def check_bundled(scoring: ScoringConfig) -> None:
    """Refuse settings that a model which brings its own files would ignore, and a folder without
    them.

    Raises:
        ConfigError: such a setting; no folder; no config; not exactly one candidate for weights,
            or one that could hold code.
    """
    for name in ("weights", "model_config_dir"):
        if (value := getattr(scoring, name)) is not None:
            raise ConfigError(
                f"scoring.{name} {value}: {scoring.model} brings its own; leave scoring.{name} out"
            )
    if not scoring.model.startswith(FOLDER):
        return
    folder = Path(scoring.model.removeprefix(FOLDER))
    needed = "open_clip_config.json and open_clip_model.safetensors"
    if not folder.is_dir():
        raise ConfigError(f"scoring.model {scoring.model}: no such folder; it must hold {needed}")
    try:
        values = json.loads((folder / "open_clip_config.json").read_bytes())
        lacking = {"embed_dim", "vision_cfg", "text_cfg"} - set(values["model_cfg"])
        problem = f"lacks {', '.join(sorted(lacking))} in model_cfg" if lacking else None
    except (KeyError, TypeError):
        problem = "lacks model_cfg"
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise ConfigError(
            f"scoring.model: {folder}/open_clip_config.json {problem}; the folder must hold "
            f"{needed}, as open_clip's push_to_hf_hub writes them"
        )
    found = sorted(
        path.name for kind in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{kind}")
    )
    if not set(PREFERRED) & set(found) and [Path(name).suffix for name in found] != [
        ".safetensors"
    ]:
        raise ConfigError(
            f"scoring.model {scoring.model} holds {', '.join(found) or 'no weights'}; name the "
            f"weights {PREFERRED[0]} (other formats can hold code: convert them first)"
        )


def check_packages(model: str, text: Mapping[str, Any]) -> None:
    """Refuse a model whose tokenizer or text encoder needs a package that is not installed.

    Args:
        model: as `scoring.model`.
        text: `text_cfg` of its config.

    Raises:
        ConfigError: the package is missing; names it and the extra that installs it.
    """
    # open_clip takes SigLIP's tokenizer by the model's name where the config names none.
    by_name = "siglip" in model.lower() and not model.startswith((FOLDER, HUB))
    named = bool(text.get("hf_tokenizer_name") or text.get("hf_model_name"))
    try:
        require_modules(*["transformers"] * (named or by_name))
    except ConfigError as error:
        raise ConfigError(
            f"scoring.model {model}: its tokenizer is one of Hugging Face's; {error}"
        ) from None


def architecture(model: str, config: Mapping[str, Any], tokenizer: Any) -> str:
    """What a scorer's identity says of a model besides its weights and preprocessing.

    The name of a model that open_clip knows; a digest of the config where folder or hub bring it,
    so that copies elsewhere are the same scorer. A tokenizer of Hugging Face's is in the digest.
    """
    own = getattr(tokenizer, "tokenizer", None)
    if own is None:  # open_clip's own tokenizer, whose settings are in the config
        text = ""
    elif (backend := getattr(own, "backend_tokenizer", None)) is not None:
        text = str(backend.to_str())
    else:
        text = json.dumps(sorted(own.get_vocab().items()))
    if not model.startswith((FOLDER, HUB)):
        return model if own is None else f"{model} {hashlib.sha256(text.encode()).hexdigest()}"
    plain = json.dumps([config, text], sort_keys=True)
    return f"open_clip_config {hashlib.sha256(plain.encode()).hexdigest()}"


@contextmanager
def answering_hub(*, wanted: bool) -> Iterator[bool]:
    """Context in which only the hub's cache is read if Hugging Face's hub does not answer within
    `HUB_S`; gives whether it answers (False if it is not `wanted`).
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    answers = wanted and not before and _answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = before or not answers
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=HUB_S).close()
    except urllib.error.HTTPError:  # an answer too
        return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # the client has its own CA
    return True


def _repository(scoring: ScoringConfig) -> str | None:
    """The repository of the hub that a model is loaded from, or its tokenizer; None: neither."""
    import open_clip

    if scoring.model.startswith(HUB):
        return scoring.model.removeprefix(HUB)
    if scoring.model.startswith(FOLDER):
        return None
    tag = open_clip.get_pretrained_cfg(scoring.model, scoring.weights) or {}
    text = open_clip.get_model_config(scoring.model)["text_cfg"]
    name: str | None = tag.get("hf_hub") or text.get("hf_tokenizer_name")
    # A tag's entry is REPOSITORY/FILE, or REPOSITORY/.
    return str(name).rpartition("/")[0] if name and "hf_hub" in tag else name or None


def _cannot_load(
    scoring: ScoringConfig, part: str, error: Exception, *, repository: str | None
) -> ConfigError:
    """Why a model cannot be loaded, and what to do.

    Args:
        scoring: names model and weights.
        part: weights or tokenizer.
        error: of open_clip.
        repository: of the hub, where the hub does not answer and its cache lacks something.
    """
    from huggingface_hub import constants

    model, weights = scoring.model, scoring.weights
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    bundled = model.startswith((FOLDER, HUB))
    what = model if bundled else f"scoring.weights {weights}"
    if part == "tokenizer":
        what = f"the tokenizer of {model}"
    if repository is not None and (part == "tokenizer" or not Path(weights or "").is_file()):
        why = f"{constants.ENDPOINT} does not answer"
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no"):
            why = "HF_HUB_OFFLINE is set"
        then = (
            "--scoring.weights FOLDER/FILE.safetensors"
            if part == "weights" and not bundled
            else f"--scoring.model {FOLDER}FOLDER (config, weights and tokenizer in one folder)"
        )
        return ConfigError(
            f"{what} is not in the cache {constants.HF_HUB_CACHE}, and {why}; where there is a "
            f"network, run `hf download {repository} --local-dir FOLDER`, copy the folder here and "
            f"give {then}"
        )
    if bundled or part == "tokenizer":
        return ConfigError(
            f"{what} cannot be loaded: {reason}; check the name, and that the folder or repository "
            "holds open_clip_config.json, the weights and the tokenizer's files"
        )
    return ConfigError(
        f"{what} cannot be loaded into {model}: {reason}; give the .safetensors file of this very "
        "model (and scoring.model_config_dir if it is your own)"
    )


def _not_finite(model: torch.nn.Module) -> str | None:
    """Name of the first weight that is not finite."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            return name
    return None


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
        raise ConfigError(
            f"scoring.weights is not set, and {model} needs weights; {remedy}; or train without "
            "CLIP: --method.draw_weights cooccurrence --data.likelihood scores"
        )
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
