"""The examples: short enough to read, equal to the trainer, and resumed at the sample."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.rank_processes import ROOT, free_port
from tests.integration.test_training_runs import end, finish, start
from vlal_dist.config.sections import ModelConfig
from vlal_dist.datasets import ShardStream
from vlal_dist.method.model import build_model

TIMM = ROOT / "examples" / "train_timm.py"
SIZES = ["--batch", "16", "--size", "64", "--ignore", "3"]

pytest.importorskip("timm")


def test_they_are_short() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path


def arguments(small: Path, checkpoint: Path, *more: str) -> list[str]:
    return [str(small / "merged"), str(checkpoint), *SIZES, *more]


def losses(output: str) -> dict[tuple[int, int], float]:
    """(epoch, samples) -> loss of a row, of the lines that the example printed."""
    found = re.findall(r"^\[(\d+), (\d+)\] loss (\S+)$", output, re.MULTILINE)
    return {(int(epoch), int(samples)): float(loss) for epoch, samples, loss in found}


def write_initial_weights(small: Path, checkpoint: Path) -> None:
    """The weights that `vlal train` starts from, under timm's names, which are torchvision's."""
    stream = ShardStream(small / "merged", batch_size=16, image_size=64)
    model = build_model(
        ModelConfig(depth=18, object_gate=False),
        num_objects=len(stream.objects),
        num_attributes=len(stream.attributes),
        seed=99,
    )
    names = {"trunk.": "", "classifier.": "fc."}
    state = {
        re.sub(r"^\w+\.", lambda found: names[found[0]], name): value
        for name, value in model.state_dict().items()
    }
    torch.save({"model": state}, checkpoint)


def run_here(monkeypatch: pytest.MonkeyPatch, capfd: Any, *given: str) -> dict[Any, float]:
    monkeypatch.setattr(sys, "argv", [str(TIMM), *given])
    monkeypatch.chdir(Path(given[1]).parent)
    runpy.run_path(str(TIMM), run_name="__main__")
    return losses(capfd.readouterr().out)


def test_started_again_it_goes_on_at_the_sample(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    write_initial_weights(small, tmp_path / "initial.pt")
    (tmp_path / "once.pt").write_bytes((tmp_path / "initial.pt").read_bytes())
    (tmp_path / "twice.pt").write_bytes((tmp_path / "initial.pt").read_bytes())
    once = arguments(small, tmp_path / "once.pt", "--epochs", "2")
    whole = run_here(monkeypatch, capfd, *once)
    assert list(whole) == [(epoch, 16 * n) for epoch in (0, 1) for n in (1, 2, 3, 4)]
    twice = arguments(small, tmp_path / "twice.pt", "--save", "3")
    assert run_here(monkeypatch, capfd, *twice, "--epochs", "1") == dict(list(whole.items())[:4])
    # The checkpoint is the third batch's: the fourth is trained on again.
    assert run_here(monkeypatch, capfd, *twice, "--epochs", "2") == dict(list(whole.items())[3:])


EPOCHS, STEPS = 6, 24


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], float]:
    """Losses of the example, not disturbed."""
    checkpoint = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    write_initial_weights(small, checkpoint)
    found = losses(finish(start(example(small, checkpoint), {})))
    assert len(found) == STEPS
    return found


def example(small: Path, checkpoint: Path) -> list[str]:
    more = ["--epochs", str(EPOCHS), "--save", "3"]
    return [sys.executable, str(TIMM), *arguments(small, checkpoint, *more)]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_its_losses_are_those_of_train(
    small: Path, tmp_path: Path, whole: dict[tuple[int, int], float]
) -> None:
    command = [
        sys.executable, "vlal_dist/train.py", "--config", str(small / "config.yaml"),
        "--paths.run", str(tmp_path), "--model.object_gate", "false", "--model.width", "64",
        "--training.reference_batch", "16", "--training.schedule", "constant",
        "--training.precision", "fp32", "--training.log_steps", "1",
        "--training.epochs", str(EPOCHS), "--method.num_ignore", "3",
        "--observability.metrics_port", str(free_port()),
    ]  # fmt: skip
    finish(start(command, {}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    trained = [one["loss"] for one in map(json.loads, lines) if "loss_positive" in one]
    assert len(trained) == STEPS and max(trained) > 1.2 * min(trained)
    assert list(whole.values()) == pytest.approx(trained, rel=1e-5)


@pytest.mark.slow
def test_killed_it_goes_on_at_the_sample(
    small: Path, tmp_path: Path, whole: dict[tuple[int, int], float]
) -> None:
    write_initial_weights(small, tmp_path / "killed.pt")
    command = example(small, tmp_path / "killed.pt")
    process = start(command, {})
    assert process.stdout is not None
    printed = ""
    while len(losses(printed)) < 14:
        assert process.poll() is None, printed
        printed += process.stdout.readline()
    end(process)  # SIGKILL, its workers too
    assert losses(printed).items() <= whole.items()
    resumed = losses(finish(start(command, {})))
    # It saves after the third of an epoch's four batches; it may have got that far unseen.
    assert list(resumed) in (list(whole)[11:], list(whole)[15:])
    assert resumed.items() <= whole.items()
