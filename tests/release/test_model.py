"""An export loads whole or not at all, and answers alike for a path, an image and a tensor."""

import doctest
import hashlib
import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fixtures.tiny_dataset import VOCABULARY
from tests.release.test_saved_model import INFO, tiny_model
from vlal_dist.config.sections import ModelConfig
from vlal_dist.data.loading.batch import to_floats
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.method.model import build_model
from vlal_dist.release.model import (
    CONFIG,
    THRESHOLDS,
    WEIGHTS,
    ExportedModel,
    ExportInfo,
    load_model,
    write_export,
)
from vlal_dist.release.saved_model import encode_weights
from vlal_dist.release.thresholds import AttributeThreshold, Thresholds, encode_thresholds
from vlal_dist.storage.store import Store, open_store

EXPORT = ExportInfo(model=INFO, vocabulary=VOCABULARY, dataset="tiny", box_expansion=0.0)
A = len(VOCABULARY.attributes)
HALF = AttributeThreshold(0.5, own=False, num_positive=1, num_negative=1)
LEARNED = Thresholds(0.5, "val", 10, dict.fromkeys(VOCABULARY.attributes, HALF))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "export"))
    files = {WEIGHTS: encode_weights(tiny_model(3))}
    files[THRESHOLDS] = encode_thresholds(LEARNED)
    write_export(store, EXPORT, files, card="# card", remarks={})
    return store


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_it_answers_like_the_network_for_every_kind_of_image(store: Store, tmp_path: Path) -> None:
    model = load_model(store.url)
    assert model.info == EXPORT and model.thresholds == LEARNED
    image = photo()
    image.save(tmp_path / "photo.png")
    found = model(image, "box", top_k=3)
    assert found == model(tmp_path / "photo.png", "box", top_k=3)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert found == model(planes, "box", top_k=3)
    assert found == model(np.array(image), "box", top_k=3)
    assert found == model(np.array(image)[:, ::-1][:, ::-1], "box", top_k=3)  # strides of its own

    small = image.resize((64, 64))
    pixels = to_floats(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None], normalize=False)
    expected = torch.sigmoid(tiny_model(3).eval()(pixels, torch.tensor([1])))[0]
    best = expected.argsort(descending=True).tolist()
    answer = model(small, "box", top_k=0)
    assert [one.name for one in answer] == [VOCABULARY.attributes[i] for i in best]
    values = [one.probability for one in answer]
    assert values == pytest.approx(expected[best].tolist(), abs=1e-6)
    assert [one.present for one in answer] == [value >= 0.5 for value in values]


def test_the_example_of_load_model(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/vaw").mkdir(parents=True)
    (tmp_path / "export").rename(tmp_path / "runs/vaw/export")
    photo().save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(load_model, "load_model", globs={})
    assert doctest.DocTestRunner().run(example) == (0, 5)


def test_a_box_is_a_part_of_the_upright_photo(store: Store) -> None:
    model = load_model(store.url)
    part = model(photo().crop((10, 20, 70, 80)), "ball")
    assert model(photo(), "ball", box=(10, 20, 60, 60)) == part
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    photo().rotate(90, expand=True).save(sink, "PNG", exif=exif)
    assert model(Image.open(sink), "ball", box=(10, 20, 60, 60)) == part


def test_ties_go_to_the_lower_id(store: Store) -> None:
    (found,) = load_model(store.url).top(torch.tensor([[0.5, 0.75, 0.5, *[0.25] * (A - 3)]]), k=4)
    names = VOCABULARY.attributes
    assert [one.name for one in found] == [names[1], names[0], names[2], names[3]]
    assert [(one.probability, one.present) for one in found] == [
        (0.75, True), (0.5, True), (0.5, True), (0.25, False)
    ]  # fmt: skip


def test_bad_arguments_are_refused_with_the_reason(store: Store, tmp_path: Path) -> None:
    model = load_model(store.url)
    with pytest.raises(DataError, match=r"unknown object: 'bal'; .* 'ball'"):
        model(photo(), "bal")
    with pytest.raises(DataError, match="needs the object's name"):
        model(photo())
    for array in (
        torch.rand(3, 64, 64),
        torch.zeros(64, 64, 3, dtype=torch.uint8),
        np.zeros((64, 64, 3), np.float32),
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((0, 64, 3), np.uint8),
    ):
        with pytest.raises(ConfigError, match=r"array \[H, W, 3\] or a tensor \[3, H, W\]"):
            model(array, "ball")
    for other in (None, b"bytes", 7, [photo()], io.BytesIO()):
        with pytest.raises(ConfigError, match=r"is no photo; give a path, an image of Pillow"):
            model(other, "ball")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"is a folder; .* --predict\.images"):
        model(tmp_path, "ball")
    for box in ((1, 2, 3), "1234", 5, (1, 2, 3, None), [[1], 2, 3, 4]):
        with pytest.raises(ConfigError, match="give x, y, width, height"):
            model(photo(), "ball", box=box)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="overflow"):
        model(photo(), "ball", box=(0, 0, float("nan"), 9))
    for top_k in (-1, None, 2.0, "3"):
        with pytest.raises(ConfigError, match="top_k"):
            model(photo(), "ball", top_k=top_k)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="by its name"):
        model(photo(), ["ball"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes a path or URL"):
        load_model(None)  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="not a file"):
        model(tmp_path / "pipe.jpg", "ball")
    photo().save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    with pytest.raises(DataError, match="truncated or damaged"):
        model(Image.open(io.BytesIO(data[: len(data) // 2])), "ball")
    with pytest.raises(DataError, match="too large: 9000x9000 pixels"):
        model(Image.new("1", (9000, 9000)), "ball")
    with pytest.raises(NotFoundError):
        model(tmp_path / "none.jpg", "ball")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.jpg: not an image"):
        model(tmp_path / "bad.jpg", "ball")


def test_transparent_pixels_lie_on_the_background_of_the_dataset(
    store: Store, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (90, 120, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cut-out.png")
    share = pixels[..., 3:] / 255

    def on(colour: tuple[int, int, int]) -> np.ndarray:
        return np.rint(pixels[..., :3] * share + colour * (1 - share)).astype(np.uint8)

    def close(model: ExportedModel, colour: tuple[int, int, int]) -> bool:
        found = model(tmp_path / "cut-out.png", "box", top_k=0)
        assert found == model(Image.open(tmp_path / "cut-out.png"), "box", top_k=0)
        expected = {one.name: one.probability for one in model(on(colour), "box", top_k=0)}
        return all(abs(one.probability - expected[one.name]) < 0.002 for one in found)

    files = {WEIGHTS: encode_weights(tiny_model(3))}
    write_export(store, replace(EXPORT, background="#0a64c8"), files, card="", remarks={})
    model = load_model(store.url)
    assert close(model, (10, 100, 200)) and not close(model, (255, 255, 255))
    values = json.loads(store.read("config.json"))
    del values["background"]  # as earlier versions wrote it
    store.replace("config.json", json.dumps(values).encode())
    assert close(load_model(store.url), (255, 255, 255))
    store.replace("config.json", json.dumps(values | {"background": "sky"}).encode())
    with pytest.raises(DataError, match="background"):
        load_model(store.url)


def test_without_an_object_gate_no_object_is_needed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "export"))
    layers = ModelConfig(depth=18, width=8, object_gate=False)
    network = build_model(layers, num_objects=3, num_attributes=A)
    info = replace(EXPORT, model=replace(INFO, layers=layers))
    write_export(store, info, {WEIGHTS: encode_weights(network)}, card="", remarks={})
    model = load_model(store.url)
    answer = model(photo())
    assert answer == model(photo(), "anything") and answer[0].present is None


def test_an_interrupted_export_does_not_load(store: Store) -> None:
    class Cut(Exception):
        pass

    def fail(key: str, data: bytes) -> None:
        raise Cut

    interrupted = open_store(store.url)
    interrupted.replace = fail  # type: ignore[method-assign]
    with pytest.raises(Cut):
        write_export(interrupted, EXPORT, {WEIGHTS: b"new"}, card="", remarks={})
    with pytest.raises(NotFoundError, match="was interrupted"):
        load_model(store.url)


def test_a_repeated_export_leaves_nothing_of_the_earlier_one(store: Store) -> None:
    write_export(store, EXPORT, {WEIGHTS: encode_weights(tiny_model())}, card="", remarks={})
    assert store.list_keys() == ["README.md", CONFIG, WEIGHTS]
    assert load_model(store.url).thresholds is None


def test_altered_files_are_refused(store: Store) -> None:
    text = store.read(CONFIG)
    values = json.loads(text)
    for name in (WEIGHTS, THRESHOLDS):
        data = store.read(name)
        store.replace(name, data[:-1] + b"?")
        with pytest.raises(DataError, match=f"{name} has sha256"):
            load_model(store.url)
        store.replace(name, data)
    for change in ({"format": 2}, {"model": {}}, {"vocabulary": {}}, {"box_expansion": "wide"}):
        store.replace(CONFIG, json.dumps({**values, **change}).encode())
        with pytest.raises(DataError, match="config"):
            load_model(store.url)
    values["model"]["depth"] = 34
    store.replace(CONFIG, json.dumps(values).encode())
    with pytest.raises(DataError, match="does not fit"):
        load_model(store.url)
    store.replace(CONFIG, text[:50])
    with pytest.raises(DataError, match="damaged"):
        load_model(store.url)


class Malicious:
    """Leaves a folder behind where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def test_a_pickle_is_never_run(store: Store, tmp_path: Path) -> None:
    data = pickle.dumps(Malicious(str(tmp_path / "executed")))
    store.replace(WEIGHTS, data)
    values = json.loads(store.read(CONFIG))
    values["files"][WEIGHTS] = hashlib.sha256(data).hexdigest()
    store.replace(CONFIG, json.dumps(values).encode())
    with pytest.raises(DataError, match="does not fit"):
        load_model(store.url)
    assert not (tmp_path / "executed").exists()
