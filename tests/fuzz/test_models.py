"""Checkpoints, saved models, exports: mutated with and without digests that fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from tests.fixtures.tiny_dataset import VOCABULARY
from tests.fuzz.mutations import byte_ops, explore, mutate_bytes, mutate_json, obeys, pick, tree_ops
from tests.release.test_saved_model import INFO, tiny_model
from vlal_dist.release.model import ExportInfo, load_model, write_export
from vlal_dist.release.saved_model import encode_weights, load_saved_model, write_model
from vlal_dist.release.thresholds import AttributeThreshold, Thresholds, encode_thresholds
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import Store, open_store
from vlal_dist.training.checkpoint import (
    COMPLETE,
    MODEL,
    OPTIMIZER,
    STATE,
    Binding,
    Checkpoint,
    TrainState,
    find_checkpoint,
    save_checkpoint,
)

BINDING = Binding("da" * 32, "0c" * 32, "fe" * 32, "train", 3, 8, 4, 16, "drop")
NEWEST = "checkpoints/00000005"


def mutated(data: bytes, tree: Any, ops: Any, as_tree: bool) -> bytes:
    """A file changed as JSON where it is one, else as bytes."""
    return mutate_json(data, tree) if as_tree and data[:1] == b"{" else mutate_bytes(data, ops)


drawn = (tree_ops, byte_ops, st.booleans(), st.booleans())


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run root with one checkpoint."""
    store = open_store(str(tmp_path / "run"))
    state = TrainState(BINDING, epoch=1, consumed=40, step=5, best_map=0.5, best_step=4)
    state.quarantined, state.batch = {"00ff00ff00ff00ff": "crc32"}, {"world_size": 1}
    weights = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7)}
    optimizer = {"w.exp_avg": torch.zeros(2, 3), "w.step": torch.tensor(5.0)}
    save_checkpoint(store, state, weights, optimizer, keep=2)
    return store


def test_checkpoint(run: Store, times: int) -> None:
    names = (MODEL, OPTIMIZER, STATE, COMPLETE)
    files = {name: run.read(f"{NEWEST}/{name}") for name in names}
    right = find_checkpoint(run, "auto")
    assert right is not None

    def check(name: str, tree: Any, ops: Any, as_tree: bool, sealed: bool) -> None:
        now = files | {name: mutated(files[name], tree, ops, as_tree)}
        if sealed and name != COMPLETE:
            digests = {one: sha256_of(now[one]) for one in (MODEL, OPTIMIZER, STATE)}
            now[COMPLETE] = json.dumps(digests).encode()
        for one, data in now.items():
            Path(run.url, NEWEST, one).write_bytes(data)
        found: Checkpoint | None = obeys(lambda: find_checkpoint(run, "auto"))
        if found is None:
            return
        found.resume_kind(1)
        obeys(lambda: found.check_resume(BINDING))
        if not sealed or now == files:
            assert found.state == right.state
            assert all(torch.equal(found.model[key], right.model[key]) for key in right.model)
        assert type(found.state.step) is int and found.state.step >= 0

    explore("checkpoint", check, pick(names), *drawn, examples=250, times=times)


def test_saved_model(tmp_path: Path, times: int) -> None:
    store = open_store(str(tmp_path))
    write_model(store, "best", encode_weights(tiny_model()), INFO)
    files = {name: store.read(f"best/{name}") for name in ("model.json", "model.safetensors")}

    def check(name: str, tree: Any, ops: Any, as_tree: bool, sealed: bool) -> None:
        now = files | {name: mutated(files[name], tree, ops, as_tree)}
        if sealed and name == "model.safetensors":
            values = json.loads(now["model.json"])
            values["sha256"] = sha256_of(now[name])
            now["model.json"] = json.dumps(values).encode()
        for one, data in now.items():
            Path(tmp_path, "best", one).write_bytes(data)
        found = obeys(lambda: load_saved_model(store, "best", vocabulary=VOCABULARY))
        assert found is None or found[1].num_attributes == INFO.num_attributes

    explore("saved model", check, pick(list(files)), *drawn, examples=120, times=times)


def test_export(tmp_path: Path, times: int) -> None:
    store = open_store(str(tmp_path))
    one = AttributeThreshold(0.5, True, 3, 4)
    thresholds = Thresholds(0.5, "val", 2, dict.fromkeys(VOCABULARY.attributes, one))
    written = {
        "model.safetensors": encode_weights(tiny_model()),
        "thresholds.json": encode_thresholds(thresholds),
    }
    info = ExportInfo(INFO, VOCABULARY, "tiny", 0.1)
    write_export(store, info, written, card="", remarks={"onnx": None})
    files = {name: store.read(name) for name in (*written, "config.json")}
    photo = torch.zeros(3, 20, 30, dtype=torch.uint8)

    def check(name: str, tree: Any, ops: Any, as_tree: bool, sealed: bool) -> None:
        now = files | {name: mutated(files[name], tree, ops, as_tree)}
        if sealed and name != "config.json":
            values = json.loads(now["config.json"])
            values["files"][name] = sha256_of(now[name])
            now["config.json"] = json.dumps(values).encode()
        for key, data in now.items():
            (tmp_path / key).write_bytes(data)
        model = obeys(lambda: load_model(tmp_path))
        if model is not None and model.info.model.image_size <= 512:
            found = obeys(lambda: model(photo, "ball", top_k=3))
            assert found is None or sealed or all(0 <= one.probability <= 1 for one in found)

    explore("export", check, pick(list(files)), *drawn, examples=120, times=times)
