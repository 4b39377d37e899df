import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import S3Server
from tests.fixtures.tiny_model import SmallClassifier, groups
from vlal_dist.errors import DataError, StorageError
from vlal_dist.storage.checks import TEMPORARY_PREFIX
from vlal_dist.storage.store import Store, open_store
from vlal_dist.training.checkpoint import (
    COMPLETE,
    Binding,
    Checkpoint,
    TrainState,
    complete_checkpoints,
    find_checkpoint,
    load_weights,
    save_checkpoint,
)
from vlal_dist.training.optimizer_state import adam_tensors, check_adam, restore_adam
from vlal_dist.training.validation import holds_best

BINDING = Binding(
    dataset_digest="d" * 64,
    vocabulary_digest="v" * 64,
    feasible_digest="f" * 64,
    train_split="train",
    seed=99,
    lanes=24,
    micro_batches=2,
    window_blocks=3,
    epoch_end="drop",
)


def trained(steps: int) -> tuple[SmallClassifier, torch.optim.Adam]:
    model = SmallClassifier()
    optimizer = torch.optim.Adam(groups(model))
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: SmallClassifier, optimizer: torch.optim.Adam, steps: range) -> None:
    for step in steps:
        image = torch.full((4, 3, 8, 8), 0.1 * step) + torch.arange(4.0)[:, None, None, None]
        optimizer.zero_grad()
        model(image, torch.tensor([0, 1, 2, 0])).square().sum().backward()
        optimizer.step()


def save(store: Store, step: int, *, keep: int = 2) -> tuple[SmallClassifier, torch.optim.Adam]:
    model, optimizer = trained(step)
    state = TrainState(
        binding=BINDING, epoch=1, consumed=32, step=step, best_map=0.1 + 0.2, best_step=3
    )
    state.schedule = {"rates": {"decay": 1e-2}, "best": 0.1 + 0.2, "bad": 1}
    size_bytes = save_checkpoint(
        store, state, model.state_dict(), adam_tensors(model, optimizer), keep=keep
    )
    prefix = complete_checkpoints(store)[0]
    keys = [key for key in store.list_keys(f"{prefix}/") if not key.endswith(COMPLETE)]
    assert size_bytes == sum(map(store.size, keys))
    return model, optimizer


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    model, optimizer = save(store, 5)
    found = find_checkpoint(store, "auto")
    assert found is not None
    assert found.state.binding == BINDING
    assert (found.state.epoch, found.state.consumed, found.state.step) == (1, 32, 5)
    assert found.state.best_map == 0.1 + 0.2
    found.state.batch = {"world_size": 2}
    assert [found.resume_kind(w) for w in (2, 1)] == ["exact", "resharded"]
    again = SmallClassifier()
    other = torch.optim.Adam(groups(again))
    load_weights(again, found.model, where="here")
    check_adam(again, found.optimizer, where="here")
    restore_adam(again, other, found.optimizer)
    for one, adam in ((model, optimizer), (again, other)):
        train(one, adam, range(5, 9))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    before, after = adam_tensors(model, optimizer), adam_tensors(again, other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_are_safetensors_named_by_parameter(tmp_path: Path) -> None:
    save(open_store(str(tmp_path)), 3)
    folder = tmp_path / "checkpoints" / "00000003"
    assert sorted(path.name for path in folder.iterdir()) == [
        "COMPLETE", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    optimizer = load_file(folder / "optimizer.safetensors")
    assert {"conv.weight.exp_avg", "conv.weight.exp_avg_sq", "conv.weight.step"} <= set(optimizer)
    assert json.loads((folder / "state.json").read_text())["step"] == 3


def test_the_newest_complete_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(str(tmp_path))
    for step in (1, 2, 3):
        save(store, step, keep=3)
    (tmp_path / "checkpoints" / "00000003" / COMPLETE).unlink()  # cut before COMPLETE was written
    weights = tmp_path / "checkpoints" / "00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # truncated
    found = find_checkpoint(store, "auto")
    assert found is not None and found.state.step == 1 and found.skipped == 1
    assert found.resume_kind(1) == "fallback"
    assert "00000002/model.safetensors has sha256" in caplog.text
    assert "falling back" in caplog.text


def test_a_run_with_only_damaged_checkpoints_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert find_checkpoint(store, "auto") is None
    save(store, 1)
    state = tmp_path / "checkpoints" / "00000001" / "state.json"
    state.write_text(state.read_text().replace("99", "98"))
    with pytest.raises(DataError, match="1 damaged"):
        find_checkpoint(store, "auto")
    with pytest.raises(DataError, match=r"state\.json has sha256"):
        find_checkpoint(store, str(state.parent))
    assert find_checkpoint(store, "none") is None


def test_resume_by_path_takes_a_checkpoint_or_a_run_root(tmp_path: Path) -> None:
    save(open_store(str(tmp_path / "a")), 1)
    save(open_store(str(tmp_path / "a")), 2)
    elsewhere = open_store(str(tmp_path / "b"))
    for path, step in (("a", 2), ("a/checkpoints/00000001", 1)):
        found = find_checkpoint(elsewhere, str(tmp_path / path))
        assert found is not None and found.state.step == step
    with pytest.raises(DataError, match="no complete checkpoint"):
        find_checkpoint(elsewhere, str(tmp_path / "nowhere"))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for step in (1, 2, 3):
        save(store, step)
    assert complete_checkpoints(store) == ["checkpoints/00000003", "checkpoints/00000002"]
    # A run that went back to an earlier step leaves the later ones behind.
    save(store, 1)
    assert complete_checkpoints(store) == ["checkpoints/00000001"]
    assert {key.split("/")[1] for key in store.list_keys("checkpoints/")} == {"00000001"}


def test_an_incomplete_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.create("checkpoints/00000002/model.safetensors", b"half")
    save(store, 2)
    save(store, 2)  # the same step again, as after a stop at an epoch's last step
    found = find_checkpoint(store, "auto")
    assert found is not None and found.state.step == 2


def test_a_save_first_removes_what_killed_saves_left(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for step in (1, 2, 3):
        save(store, step)
    cut = tmp_path / "checkpoints" / "00000003"
    (cut / COMPLETE).unlink()
    (cut / f"{TEMPORARY_PREFIX}half").write_bytes(b"half")
    save(store, 4)
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {"00000002", "00000004"}


def test_a_failed_save_keeps_older_checkpoints(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save(store, 1)
    (tmp_path / "checkpoints" / "00000002").write_bytes(b"a file where a folder must be made")
    with pytest.raises(StorageError):
        save(store, 2)
    found = find_checkpoint(store, "auto")
    assert found is not None and found.state.step == 1


def test_holds_best_needs_the_complete_model_of_the_state(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    state = TrainState(binding=BINDING, step=4, best_map=0.25, best_step=4)
    assert not holds_best(store, state)
    weights = b"weights"
    info = {"step": 4, "validation_map": 0.25, "sha256": hashlib.sha256(weights).hexdigest()}
    store.replace("best/model.safetensors", weights)
    store.replace("best/model.json", json.dumps(info).encode())
    assert holds_best(store, state)
    assert not holds_best(store, replace(state, best_step=8))
    store.replace("best/model.safetensors", b"those of the next save, which was cut")
    assert not holds_best(store, state)


def test_through_s3(moto_s3: S3Server) -> None:
    store = open_store(moto_s3.url())
    for step in (1, 2, 3):
        save(store, step)
    found = find_checkpoint(store, "auto")
    assert found is not None and found.state.step == 3
    assert len(complete_checkpoints(store)) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("vocabulary_digest", "0" * 64), ("seed", 7), ("lanes", 48)]
)
def test_another_binding_is_refused_with_both_values(field: str, value: object) -> None:
    found = Checkpoint("run", TrainState(binding=BINDING), model={}, optimizer={})
    with pytest.raises(DataError, match=f"{field} is {value}, the checkpoint has") as caught:
        found.check_resume(replace(BINDING, **{field: value}))  # type: ignore[arg-type]
    assert str(getattr(BINDING, field)) in str(caught.value)
    found.check_resume(replace(BINDING, lanes=0))


def test_another_model_is_refused() -> None:
    model, optimizer = trained(2)
    tensors = adam_tensors(model, optimizer)
    del tensors["conv.bias.exp_avg"]
    with pytest.raises(DataError, match=r"lacks conv\.bias\.exp_avg;"):
        check_adam(model, tensors, where="here")
    with pytest.raises(DataError, match="does not fit"):
        load_weights(model, {"conv.weight": torch.zeros(1)}, where="here")
