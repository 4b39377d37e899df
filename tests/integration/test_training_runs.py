"""Training runs as users start them: the deepspeed launcher, bare ranks, plain python; on CPU."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.rank_processes import ROOT, environment, free_port
from vlal_dist.config.sections import DataConfig, LossConfig, PathsConfig, ScoringConfig
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.release.saved_model import load_saved_model
from vlal_dist.storage.store import open_store
from vlal_dist.training.data import open_data
from vlal_dist.training.trainer import remove_run
from vlal_dist.vocabulary import Vocabulary

pytestmark = pytest.mark.deepspeed


def arguments(small: Path, run: Path, *more: str) -> list[str]:
    port = str(free_port())
    return [
        "vlal_dist/train.py", "--config", str(small / "config.yaml"), "--paths.run", str(run),
        "--training.epochs", "2", "--training.log_steps", "2",
        "--observability.metrics_port", port, *more,
    ]  # fmt: skip


def launch(small: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    """`deepspeed` on two ranks, in a session of its own so that a kill reaches all of it."""
    program = str(Path(sys.executable).parent / "deepspeed")
    command = [program, "--num_accelerators", "2", "--master_port", str(free_port())]
    return start([*command, *arguments(small, run, *more)], {})


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        end(process)
    assert process.returncode == code, output
    return output


def end(process: subprocess.Popen[str]) -> None:
    """Kill the session of the process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def wait_for(what: Path, process: subprocess.Popen[str], *, holding: bytes = b"") -> None:
    deadline = time.monotonic() + 200
    while not (what.exists() and holding in what.read_bytes()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{what} did not appear"
        time.sleep(0.02)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{step:08d}" / "model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def starts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    output = finish(launch(small, run))
    assert "train: done: epochs 2, steps 8, ranks 2" in output
    assert output.count("selective loss by backend") == 1  # of rank 0
    return run


def test_a_run_writes_best_model_metrics_and_result(undisturbed: Path, small: Path) -> None:
    vocabulary = Vocabulary.from_json(json.loads((small / "merged/vocabulary.json").read_text()))
    _, info = load_saved_model(open_store(str(undisturbed)), "best", vocabulary=vocabulary)
    written = lines(undisturbed)
    found = [line for line in written if line["kind"] == "validation"]
    assert [line["step"] for line in found] == [4, 8]
    assert info.validation_map == max(line["mAP"] for line in found)
    steps = [line for line in written if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    terms = ("positive", "negative", "feasible", "infeasible")
    for line in steps:
        assert line["loss"] == pytest.approx(sum(line[f"loss_{term}"] for term in terms))
        assert line["ignored_effective"] > 0 and line["samples_per_s"] > 0
    assert json.loads((undisturbed / "train.result.json").read_text())["code"] == 0
    assert (undisturbed / "config.yaml").exists()
    (begun,) = starts(undisturbed)
    assert begun["step"] == 0 and begun["ranks"] == 2 and begun["device"] and begun["cores"] >= 1


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_plain_python_continues(
    small: Path, tmp_path: Path
) -> None:
    port, ranks = str(free_port()), []
    targets = ("--observability.targets", str(tmp_path / "targets"))
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(start([sys.executable, *arguments(small, tmp_path, *targets)], env))
    wait_for(tmp_path / "metrics.jsonl", ranks[0], holding=b"step")
    os.kill(ranks[1].pid, signal.SIGTERM)
    outputs = [finish(rank, code=75) for rank in ranks]
    assert list((tmp_path / "targets").iterdir()) == []  # both ended regularly
    assert "stopped by SIGTERM" in outputs[1] and "the same command resumes" in outputs[0]
    (saved,) = (tmp_path / "checkpoints").iterdir()
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] < 8 and state["binding"]["micro_batches"] == 2
    finish(start([sys.executable, *arguments(small, tmp_path)], {}))
    state = json.loads((tmp_path / "checkpoints/00000008/state.json").read_text())
    assert (state["step"], state["epoch"], state["batch"]["world_size"]) == (8, 2, 1)
    begun = [(start["step"], start["ranks"]) for start in starts(tmp_path)]
    assert begun[0] == (0, 2) and begun[-1][1] == 1 and len(begun) == 2


def vlal_train(small: Path, run: Path, *more: str) -> list[str]:
    """`vlal train --ranks 2`, without any variable that would choose the device."""
    unset = ("env", "-u", "DS_ACCELERATOR", "-u", "OMP_NUM_THREADS")
    words = arguments(small, run, *more)[1:]
    return [*unset, sys.executable, "-m", "vlal_dist", "train", "--ranks", "2", *words]


def checkpoint(run: Path) -> dict[str, bytes]:
    files = (run / "checkpoints/00000008").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
def test_ranks_of_vlal_train_save_together_and_end_equal_to_deepspeeds(
    undisturbed: Path, small: Path, tmp_path: Path
) -> None:
    process = start(vlal_train(small, tmp_path, "--training.checkpoint_steps", "1"), {})
    wait_for(tmp_path / "checkpoints/00000001/COMPLETE", process)
    process.terminate()
    output = finish(process, code=75)
    assert "the same command resumes" in output and "Traceback" not in output
    saved = max((tmp_path / "checkpoints").iterdir())
    assert saved.name < "00000008" and (saved / "COMPLETE").exists()
    output = finish(start(vlal_train(small, tmp_path), {}))
    assert "train: done: epochs 2, steps 8, ranks 2" in output and "OMP_NUM_THREADS" not in output
    assert len(checkpoint(tmp_path)) >= 2 and checkpoint(tmp_path) == checkpoint(undisturbed)


@pytest.mark.slow
def test_vlal_train_ends_with_the_ranks_code_and_without_a_traceback(
    small: Path, tmp_path: Path
) -> None:
    nowhere = ("--paths.merged", str(tmp_path / "nowhere"))
    output = finish(start(vlal_train(small, tmp_path, *nowhere), {}), code=65)
    lines = [line for line in output.splitlines() if line]
    assert all(line.startswith("train: error: ") for line in lines) and lines, output


@pytest.mark.parametrize(
    ("words", "env", "code", "message"),
    [
        (["--ranks", "0"], {}, 2, "--ranks must be a number from 1, got '0'"),
        (["--ranks=two"], {}, 2, "--ranks must be a number from 1, got 'two'"),
        (["--ranks", "2"], {"RANK": "0"}, 2, "RANK is set by a launcher): leave out --ranks"),
        (["--ranks", "2", "--training.epoch", "3"], {}, 64, "nearest known one is training.epochs"),
        (["--ranks"], {}, 2, "--ranks needs a value"),
    ],
)
def test_wrong_ranks_are_refused_before_any_is_started(
    words: list[str], env: dict[str, str], code: int, message: str
) -> None:
    output = finish(start([sys.executable, "-m", "vlal_dist", "train", *words], env), code=code)
    assert output.startswith("train: error: ") and message in output
    assert len(output.splitlines()) == 1


def damaged_copy(small: Path, folder: Path, split: str) -> Path:
    """The merged dataset with one byte of one sample changed."""
    shutil.copytree(small / "merged", folder)
    shard = sorted((folder / split / "shards").iterdir())[0]
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.seek(700)
        byte = file.read(1)
        file.seek(700)
        file.write(bytes([byte[0] ^ 1]))
    return folder


def two_ranks(small: Path, run: Path, *more: str) -> list[str]:
    """Outputs of two ranks that must both end with 65."""
    port, ranks = str(free_port()), []
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(start([sys.executable, *arguments(small, run, *more)], env))
    return [finish(rank, code=65) for rank in ranks]


@pytest.mark.slow
def test_a_damaged_sample_of_one_rank_ends_all_with_its_exit_code(
    small: Path, tmp_path: Path
) -> None:
    merged, run = damaged_copy(small, tmp_path / "merged", "train"), tmp_path / "run"
    targets = tmp_path / "targets"
    outputs = two_ranks(
        small, run, "--paths.merged", str(merged), "--observability.targets", str(targets)
    )
    mentions = [output.count("crc32") for output in outputs]
    assert sorted(mentions) == [0, 1], outputs
    assert "another rank failed" in outputs[mentions.index(0)]
    result = json.loads((run / "train.result.json").read_text())
    assert result["code"] == 65 and not (run / "checkpoints").exists()
    left = [json.loads(path.read_text())[0] for path in sorted(targets.iterdir())]
    assert [one["labels"]["rank"] for one in left] == ["0", "1"]  # Prometheus reports them as down
    assert {one["labels"]["run"] for one in left} == {str(run)}


@pytest.mark.slow
def test_a_failed_validation_saves_the_epoch(small: Path, tmp_path: Path) -> None:
    merged, run = damaged_copy(small, tmp_path / "merged", "val"), tmp_path / "run"
    two_ranks(small, run, "--paths.merged", str(merged))
    state = json.loads((run / "checkpoints/00000004/state.json").read_text())
    assert (state["step"], state["epoch"], state["consumed"]) == (4, 0, 64)
    shutil.rmtree(merged)
    shutil.copytree(small / "merged", merged)
    output = finish(
        start([sys.executable, *arguments(small, run, "--paths.merged", str(merged))], {})
    )
    assert "step 4, epoch 1, 64 samples in" in output and "steps 8" in output


def test_resume_none_removes_checkpoints_and_best_model(
    undisturbed: Path, small: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    remove_run(open_store(str(run)))
    assert not (run / "best/model.json").exists() and not list(run.glob("checkpoints/*/COMPLETE"))


def test_likelihoods_of_tars_follow_another_temperature(small: Path) -> None:
    def read(temperature: float | None, *, scores: bool) -> list[np.ndarray[Any, Any]]:
        paths = PathsConfig(
            dataset=str(small / "dataset"),
            merged=str(small / "merged"),
            scores=str(small / "scores"),
            cache=str(small / "cache"),
        )
        sources = open_data(
            paths,
            DataConfig(likelihood="scores" if scores else "tar"),
            LossConfig(),
            ScoringConfig(temperature=temperature),
        )
        reader, rows = ShardReader(sources.corpus), np.arange(5)
        at = reader.locate(rows)
        parts = [data[slice(*at.likelihood[n])] for n, data in enumerate(reader.read(at, 0, 5))]
        assert sources.read_likelihoods is not None
        values, indptr = sources.read_likelihoods(rows, parts)
        return [values[a:b] for a, b in pairwise(indptr.tolist())]

    for temperature in (None, 0.2):
        pairs = zip(read(temperature, scores=False), read(temperature, scores=True), strict=True)
        assert all(np.allclose(one, other, atol=1e-5) for one, other in pairs)
    assert not np.allclose(read(None, scores=False)[0], read(0.2, scores=False)[0], atol=1e-2)
