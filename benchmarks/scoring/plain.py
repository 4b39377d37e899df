"""CLIP likelihoods of a packed dataset by open_clip alone, for benchmarks/scoring/equality.py.

The method in as few lines as it takes: one crop at a time, tar by tar. Imports nothing of
vlal_dist, so that the two have no code in common; reads the dataset's files, not its index.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from PIL import Image

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PlainScores:
    """One crop: its name in the tar, and a value per feasible attribute of its object."""

    key: str
    similarity: Floats
    likelihood: Floats


class PlainScorer:
    """open_clip as its README uses it, in fp32 on the CPU.

    Args:
        root: the dataset's folder.
        model: open_clip model name.
        folder: holds MODEL.json and MODEL.safetensors.
    """

    def __init__(self, root: Path, *, model: str, folder: Path) -> None:
        torch.set_num_threads(1)  # for one small crop at a time, more only wait for each other
        open_clip.add_model_config(folder)
        self._model, _, self._preprocess = open_clip.create_model_and_transforms(
            model, pretrained=str(folder / f"{model}.safetensors")
        )
        self._model.eval()
        self._tokenizer = open_clip.get_tokenizer(model)
        self._root = root
        self._names = json.loads((root / "vocabulary.json").read_text())
        with np.load(root / "feasible.npz") as sets:
            self._indptr, self._indices = sets["indptr"], sets["indices"]
        self._text: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def score(self, split: str) -> Iterator[PlainScores]:
        """The crops of a split, in the order of its tars."""
        for jpg, sample, key in _samples(self._root / split / "shards"):
            x, y, w, h = (int(value) for value in sample["box_in_crop"])
            crop = Image.open(io.BytesIO(jpg)).crop((x, y, x + w, y + h))
            image = self._model.encode_image(self._preprocess(crop)[None])
            image = image / image.norm(dim=-1, keepdim=True)
            similarity = (image @ self._encoded(int(sample["object_id"])).T)[0]
            likelihood = (self._model.logit_scale.exp() * similarity).softmax(dim=-1)
            yield PlainScores(key, similarity.numpy(), likelihood.numpy())

    def _encoded(self, object_id: int) -> torch.Tensor:
        """The prompts of an object's feasible attributes; encoded once, when first needed."""
        if object_id not in self._text:
            name = self._names["objects"][object_id]
            attributes = self._indices[self._indptr[object_id] : self._indptr[object_id + 1]]
            prompts = [f"a photo of {self._names['attributes'][a]} {name}" for a in attributes]
            text = self._model.encode_text(self._tokenizer(prompts))
            self._text[object_id] = text / text.norm(dim=-1, keepdim=True)
        return self._text[object_id]


def _samples(folder: Path) -> Iterator[tuple[bytes, dict[str, Any], str]]:
    """JPEG, JSON and key of every sample."""
    for path in sorted(folder.iterdir()):
        parts: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                parts[part] = file.read()
                if {"jpg", "json"} <= set(parts):
                    yield parts["jpg"], json.loads(parts["json"]), key
                    parts = {}
