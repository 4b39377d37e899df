"""The small packed dataset, and a tiny open_clip model with random weights, made once a session."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.fixtures.tiny_vaw import run_all, write_small_vaw
from vlal_dist.config.sections import ScoringConfig
from vlal_dist.scoring.clip import ClipEncoder, PhaseSeconds, load_clip

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": [1, 1, 1, 1],
        "width": 16,
        "head_width": 16,
        "patch_size": None,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
SHARED = Path(__file__).parents[3] / "shared" / "models" / "fashion_clip"


@dataclass(frozen=True)
class Model:
    """An open_clip model in a folder: NAME.json and NAME.safetensors."""

    name: str
    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    def flags(self) -> list[str]:
        """Command line that chooses it."""
        return [
            *("--scoring.model", self.name),
            *("--scoring.model_config_dir", str(self.folder)),
            *("--scoring.weights", str(self.weights)),
        ]

    def section(self, **more: Any) -> ScoringConfig:
        """The config section that chooses it."""
        return ScoringConfig(
            model=self.name,
            model_config_dir=str(self.folder),
            weights=str(self.weights),
            **more,
        )

    def load(self, *, batch_size: int = 8, **more: Any) -> ClipEncoder:
        return load_clip(self.section(**more), device="cpu", batch_size=batch_size)


def encode_images(encoder: ClipEncoder, crops: list[Image.Image]) -> np.ndarray:
    """Unit vectors [n, D] of crops, in batches as the scorer makes them."""
    pixels, size = [encoder.prepare(crop) for crop in crops], encoder.batch_size
    batches = [pixels[start : start + size] for start in range(0, len(pixels), size)]
    return np.concatenate([encoder.encode_batch(b, seconds=PhaseSeconds()) for b in batches])


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_tiny_model(folder: Path, *, seed: int, image_size: int = 32) -> Model:
    """Random weights from a seed; the process's random state is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = TINY["vision_cfg"] | {"image_size": image_size}
    (folder / "tiny.json").write_text(json.dumps(TINY | {"vision_cfg": vision}))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = open_clip.create_model("tiny")
    safetensors.torch.save_file(net.state_dict(), folder / "tiny.safetensors")
    return Model("tiny", folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-clip"), seed=7)


@pytest.fixture(scope="session")
def fashion() -> Model:
    model = Model("fashion_clip", SHARED)
    if not model.weights.is_file():
        pytest.skip("needs the trained model in ../shared/models/fashion_clip")
    return model


@pytest.fixture(scope="session")
def dataset(small: Path) -> Path:
    """Config file of a packed dataset: 72 + 18 + 24 samples in 7 shards; leave it as it is."""
    return small / "config.yaml"


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a dataset with enough small shards to be interrupted in the middle."""
    config = write_small_vaw(tmp_path_factory.mktemp("many"), images={"train": 100})
    config.write_text(config.read_text().replace("shard_bytes: 60000", "shard_bytes: 30000"))
    run_all(config, ["clean", "pack"])
    return config


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No running Ray, nothing from or into the home, a short folder for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vlr"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    shutil.rmtree(folder, ignore_errors=True)
