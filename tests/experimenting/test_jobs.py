"""Commands of a run that are still to do, and their devices."""

import json
from pathlib import Path

import pytest

from vlal_dist.experimenting.jobs import Job, Place, commands_of, state_of

CPU = Place(ranks=2, devices=(), cores=3)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def names(job: Job) -> list[str]:
    return [command.name for command in commands_of(job, CPU)]


def test_finished_commands_are_not_repeated(tmp_path: Path) -> None:
    prior = tmp_path / "ce"
    job = Job("psl", 1, tmp_path / "psl", "", prior, truth=True)
    assert state_of(job) == "to do" and names(job) == ["prior", "train", "evaluate"]
    write(prior / "evaluation/train-model/result.json", {})
    write(job.root / "train.result.json", {"code": 65})
    (job.root / "log.txt").touch()
    assert state_of(job) == "started" and names(job) == ["train", "evaluate"]
    write(job.root / "train.result.json", {"code": 0})
    assert names(job) == ["evaluate"]
    write(job.root / "failed.json", {})
    assert state_of(job) == "failed"
    # Evaluated before complete labels were configured: only the evaluation is repeated.
    result = job.root / "evaluation/test-model/result.json"
    write(result, {"truth": None})
    assert state_of(job) == "failed" and names(job) == ["evaluate"]
    write(result, {"truth": {"groups": []}})
    assert state_of(job) == "done"


def test_commands_name_their_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = Job("selective", 1, tmp_path, "", None, truth=False)
    train, evaluate = commands_of(job, Place(ranks=2, devices=("6", "7"), cores=3))
    assert train.argv[1:3] == ["--include", "localhost:6,7"]
    assert "CUDA_VISIBLE_DEVICES" not in train.environment
    assert "DS_ACCELERATOR" not in train.environment
    assert evaluate.environment["CUDA_VISIBLE_DEVICES"] == "6"
    assert evaluate.environment["OMP_NUM_THREADS"] == "3"
    train, _ = commands_of(job, CPU)
    assert train.argv[1:3] == ["--num_accelerators", "2"]
    assert train.environment["DS_ACCELERATOR"] == "cpu"
    other, _ = commands_of(job, CPU)
    ports = [one.argv[one.argv.index("--master_port") + 1] for one in (train, other)]
    assert all(port.isdigit() for port in ports)
