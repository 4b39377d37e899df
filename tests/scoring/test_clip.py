"""The encoders: open_clip's own numbers, bits independent of the batch, errors in one line."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.scoring.conftest import Model, encode_images, make_tiny_model
from vlal_dist.config.sections import ScoringConfig
from vlal_dist.errors import ConfigError
from vlal_dist.scoring.clip import check_weights, load_clip, state_digest

TEXTS = ["a photo of red cup", "a photo of blue hat", "tall"]


def crops(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    sizes = [(40 + 13 * i, 90 - 7 * i) for i in range(count)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def test_equals_open_clip(fashion: Model) -> None:
    encoder = fashion.load()
    open_clip.add_model_config(fashion.folder)
    net, _, preprocess = open_clip.create_model_and_transforms(
        "fashion_clip", pretrained=str(fashion.weights)
    )
    net.eval()
    with torch.no_grad():
        images = net.encode_image(torch.stack([preprocess(c) for c in crops(3)]), normalize=True)
        texts = net.encode_text(open_clip.get_tokenizer("fashion_clip")(TEXTS), normalize=True)
    np.testing.assert_allclose(encode_images(encoder, crops(3)), images.numpy(), atol=2e-6)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts.numpy(), atol=2e-6)
    assert encoder.temperature == pytest.approx(1 / net.logit_scale.exp().item(), rel=1e-6)


def test_a_row_does_not_depend_on_the_rest_of_its_batch(tiny: Model) -> None:
    encoder = tiny.load(batch_size=4)
    together = encode_images(encoder, crops(6))
    assert together.shape == (6, 16)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(encode_images(encoder, crops(6)[4:]), together[4:])
    np.testing.assert_array_equal(encoder.encode_texts(TEXTS)[:1], encoder.encode_texts(TEXTS[:1]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near(tiny: Model, precision: str) -> None:
    exact, rough = tiny.load(), tiny.load(precision=precision)
    images = encode_images(rough, crops(5))
    assert images.dtype == np.float32
    assert (images * encode_images(exact, crops(5))).sum(axis=1).min() > 0.99
    assert not np.array_equal(images, encode_images(exact, crops(5)))
    assert rough.weights_digest == exact.weights_digest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own use
def test_compiled_stays_near(tiny: Model) -> None:
    exact = tiny.load()
    quick = tiny.load(compile=True)
    assert quick.weights_digest == exact.weights_digest
    np.testing.assert_allclose(
        encode_images(quick, crops(5)), encode_images(exact, crops(5)), atol=1e-5
    )
    np.testing.assert_allclose(quick.encode_texts(TEXTS), exact.encode_texts(TEXTS), atol=1e-5)


def test_digest_of_weights_sees_name_type_shape_and_value() -> None:
    state = {"a": torch.arange(4.0), "b": torch.tensor(1.5)}
    others = [
        {"a": torch.arange(4.0), "c": torch.tensor(1.5)},
        {"a": torch.arange(4.0).half(), "b": torch.tensor(1.5)},
        {"a": torch.arange(4.0).view(2, 2), "b": torch.tensor(1.5)},
        {"a": torch.arange(4.0), "b": torch.tensor(1.25)},
    ]
    digests = [state_digest(one) for one in (state, *others)]
    assert len(set(digests)) == 5
    assert state_digest(dict(reversed(list(state.items())))) == digests[0]


def test_other_weights_have_another_digest(tiny: Model, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=8)
    assert other.load().weights_digest != tiny.load().weights_digest
    assert other.load().preprocessing_digest == tiny.load().preprocessing_digest


def refusal(model: str, folder: Path | None, weights: str | None) -> str:
    with pytest.raises(ConfigError) as error:
        load_clip(
            ScoringConfig(
                model=model,
                model_config_dir=None if folder is None else str(folder),
                weights=weights,
            ),
            device="cpu",
        )
    assert error.value.exit_code == 64
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals_name_the_remedy(tiny: Model, tmp_path: Path) -> None:
    pickle = tmp_path / "weights.pt"
    pickle.write_bytes(b"no")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no")
    alien = tmp_path / "alien.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, alien)
    assert "weights is not set" in refusal("ViT-B-32-quickgelu", None, None)
    assert "openai" in refusal("ViT-B-32-quickgelu", None, None)
    assert "no such file" in refusal("tiny", tiny.folder, str(tmp_path / "absent.safetensors"))
    assert "not a .safetensors file" in refusal("tiny", tiny.folder, str(pickle))
    assert "cannot be loaded" in refusal("tiny", tiny.folder, str(damaged))
    assert "cannot be loaded" in refusal("tiny", tiny.folder, str(alien))
    assert "no open_clip model" in refusal("ViT-Z-99", None, None)
    assert "No such file" in refusal("tiny", tmp_path / "absent", None)
    (tmp_path / "tiny.json").write_text("{")
    assert "cannot be read (Expecting" in refusal("tiny", tmp_path, None)
    (tmp_path / "tiny.json").write_text('{"embed_dim": 4}')
    assert "lacks text_cfg, vision_cfg" in refusal("tiny", tmp_path, None)


def test_a_tag_of_the_model_is_accepted() -> None:
    check_weights("ViT-B-32-quickgelu", "openai", tags=["openai"])
