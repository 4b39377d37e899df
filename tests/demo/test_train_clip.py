"""The demo's CLIP: open_clip loads its config and weights as a user would, and it encodes."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from vlal_dist.demo import train_clip
from vlal_dist.demo.train_clip import Crop, caption, crops_of, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP trained for a moment: everything but good."""
    out = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_clip, "BATCH_SIZE", 8)
        arguments = ["--out", str(out), "--images", "6", "--epochs", "1", "--workers", "1"]
        assert main(arguments) == 0
    return out


def test_open_clip_loads_and_encodes_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    open_clip.add_model_config(folder)
    weights = str(folder / "demo_clip.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms("demo_clip", pretrained=weights)
    model.eval()
    tokens = open_clip.get_tokenizer("demo_clip")(["a photo of red mug", "a photo of lit lamp"])
    picture = preprocess(Image.fromarray(np.full((90, 70, 3), 120, dtype=np.uint8)))
    with torch.no_grad():
        visual = model.encode_image(picture[None], normalize=True)
        textual = model.encode_text(tokens, normalize=True)
    assert visual.shape == (1, 128) and textual.shape == (2, 128)
    assert torch.isfinite(visual @ textual.T).all()
    assert 0.005 < 1 / float(model.logit_scale.detach().exp()) < 0.2
    assert (folder / "demo_clip.safetensors").stat().st_size < 12_000_000


def test_weights_that_are_there_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "demo_clip.safetensors").read_bytes()
    assert main(["--out", str(folder)]) == 0
    assert "is there" in capsys.readouterr().out
    assert (folder / "demo_clip.safetensors").read_bytes() == before


def test_captions_name_one_to_three_true_attributes() -> None:
    crop = Crop(
        pixels=np.zeros((1, 1, 3), dtype=np.uint8),
        kind="mug",
        attributes=("ceramic", "red", "round", "striped"),
    )
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(100):
        words = caption(rng, crop).split()
        assert words[:3] == ["a", "photo", "of"] and words[-1] == "mug"
        assert set(words[3:-1]) <= set(crop.attributes)
        lengths.add(len(words) - 4)
    assert lengths == {1, 2, 3}


def test_crops_are_square_and_the_same_for_the_same_seed() -> None:
    one, two = crops_of((1001, 0)), crops_of((1001, 0))
    assert [crop.kind for crop in one] == [crop.kind for crop in two]
    for left, right in zip(one, two, strict=True):
        assert left.pixels.shape == (72, 72, 3)
        assert np.array_equal(left.pixels, right.pixels)
