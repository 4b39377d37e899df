"""The encoders: open_clip's own numbers, bits independent of the batch, errors in one line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
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


def bundled_model(source: Model, folder: Path) -> ScoringConfig:
    """A model in a folder as open_clip publishes them, with weights named by the file."""
    folder.mkdir(parents=True)
    config = {"model_cfg": json.loads((source.folder / f"{source.name}.json").read_text())}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copyfile(source.weights, folder / "open_clip_model.safetensors")
    return ScoringConfig(model=f"local-dir:{folder}")


def test_a_model_in_a_folder(tiny: Model, tmp_path: Path) -> None:
    section = bundled_model(tiny, tmp_path / "a")
    encoder, plain = load_clip(section, device="cpu", batch_size=8), tiny.load()
    np.testing.assert_array_equal(encoder.encode_texts(TEXTS), plain.encode_texts(TEXTS))
    assert encoder.weights_digest == plain.weights_digest
    assert plain.architecture == "tiny"  # as in roots of earlier versions
    # A copy elsewhere is the same scorer; another config with the same weights is not.
    copy = load_clip(bundled_model(tiny, tmp_path / "b"), device="cpu")
    assert copy.architecture == encoder.architecture
    config = tmp_path / "b" / "open_clip_config.json"
    config.write_text(config.read_text().replace('"heads": 2', '"heads": 4'))
    other = load_clip(section.model_copy(update={"model": f"local-dir:{tmp_path}/b"}), device="cpu")
    assert other.weights_digest == encoder.weights_digest
    assert other.architecture != encoder.architecture


def refused(section: ScoringConfig) -> str:
    with pytest.raises(ConfigError) as error:
        load_clip(section, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_no_model(tiny: Model, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    section = bundled_model(tiny, folder)
    assert "leave scoring.weights out" in refused(section.model_copy(update={"weights": "openai"}))
    (folder / "open_clip_model.safetensors").rename(folder / "pytorch_model.bin")
    assert "can hold code" in refused(section)
    (folder / "pytorch_model.bin").unlink()
    assert "no weights" in refused(section)
    (folder / "open_clip_config.json").write_text("{}")
    assert "lacks model_cfg" in refused(section)
    (folder / "open_clip_config.json").write_text("[")
    assert "cannot be read" in refused(section)
    assert "no such folder" in refused(ScoringConfig(model=f"local-dir:{tmp_path}/none"))
    assert "no such folder" in refused(ScoringConfig(model=f"local-dir:{tmp_path}/m%s{{}}"))


def test_a_model_of_the_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused within seconds where nothing answers, and the repository is named."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    section = ScoringConfig(model="hf-hub:organisation/model")
    message = refused(section)
    assert "http://127.0.0.1:9 does not answer" in message
    assert "hf download organisation/model --local-dir FOLDER" in message
    assert "--scoring.model local-dir:FOLDER" in message
    message = refused(ScoringConfig(model="ViT-B-32-quickgelu", weights="openai"))
    assert "hf download timm/vit_base_patch32_clip_224.openai --local-dir FOLDER" in message
    assert "--scoring.weights FOLDER/FILE.safetensors" in message
    assert constants.HF_HUB_OFFLINE is False
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refused(section)


def test_the_missing_package_is_named(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    config = json.loads((tiny.folder / "tiny.json").read_text())
    (tmp_path / "my-siglip.json").write_text(json.dumps(config))
    config["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
    (tmp_path / "other.json").write_text(json.dumps(config))
    for model in ("my-siglip", "other"):
        message = refusal(model, tmp_path, str(tiny.weights))
        assert "transformers is not installed; run: pip install 'vlal-dist[hf]'" in message
        assert f"scoring.model {model}: its tokenizer" in message and "weights" not in message


def test_a_tokenizer_in_the_folder(tiny: Model, tmp_path: Path) -> None:
    """Of Hugging Face's kind: it is loaded without a network, and is part of the identity."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    digests = []
    for words in (["red", "blue", "cup"], ["red", "blue", "hat"]):
        folder = tmp_path / words[-1]
        section = bundled_model(tiny, folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "any"
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        vocabulary = {word: place for place, word in enumerate(["<pad>", "<unk>", *words])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
        encoder = load_clip(section, device="cpu", batch_size=4)
        ids, cut = encoder.tokens(["red cup", " ".join(["blue"] * 16), " ".join(["blue"] * 17)])
        assert ids.shape == (3, 16) and cut.tolist() == [False, False, True]
        digests.append(encoder.architecture)
    assert digests[0] != digests[1]


def test_cut_texts(tiny: Model) -> None:
    encoder = tiny.load()
    texts = ["tall " * count for count in (1, 13, 14, 15, 30)]  # 16 tokens with start and end
    ids, cut = encoder.tokens(texts)
    assert ids.shape == (5, 16) and encoder.context_length == 16
    assert cut.tolist() == [False, False, False, True, True]
    assert encoder.tokens(["a" * 10_000])[1].tolist() == [True]


def test_broken_weights_are_named(tiny: Model, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(tiny.weights)
    broken = tmp_path / "tiny.safetensors"
    state["text_projection"][0, 0] = float("nan")
    safetensors.torch.save_file(state, broken)
    message = refusal("tiny", tiny.folder, str(broken))
    assert "text_projection holds NaN" in message and str(broken) in message


def test_overflow_names_the_precision(tiny: Model, tmp_path: Path) -> None:
    """Weights whose values leave float16, not float32: the remedy works."""
    state = safetensors.torch.load_file(tiny.weights)
    state["ln_final.weight"] *= 1e5
    large = tmp_path / "tiny.safetensors"
    safetensors.torch.save_file(state, large)
    section = tiny.section(precision="fp16").model_copy(update={"weights": str(large)})
    with pytest.raises(ConfigError, match=r"repeat with scoring\.precision fp32"):
        load_clip(section, device="cpu", batch_size=4).encode_texts(TEXTS)
    again = section.model_copy(update={"precision": "fp32"})
    assert np.isfinite(load_clip(again, device="cpu", batch_size=4).encode_texts(TEXTS)).all()
    state["ln_final.weight"] *= 1e38
    state["text_projection"] *= 1e38
    state["ln_final.weight"].clamp_(-3e38, 3e38)
    state["text_projection"].clamp_(-3e38, 3e38)
    safetensors.torch.save_file(state, large)
    with pytest.raises(ConfigError, match=r"give other scoring\.weights"):
        load_clip(again, device="cpu", batch_size=4).encode_texts(TEXTS)
