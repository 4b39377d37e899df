"""Real Ray on this machine: equal bytes with and without it, a killed actor, a signal, a job."""

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.fixtures.ray_processes import (
    ROOT,
    WAIT_S,
    actor_pids,
    alive,
    on_ray,
    python,
    started,
    wait_until,
)
from tests.fixtures.tiny_vaw import run
from tests.scoring.conftest import Model
from tests.scoring.test_score_clip import PROGRAM, counts, data_files, flags
from vlal_dist.errors import ConfigError
from vlal_dist.ray_tasks import on_running_ray

HEAD = ROOT / "clusters" / "ray" / "start-local-head.sh"

pytestmark = pytest.mark.ray_cluster


@pytest.mark.slow
def test_ray_with_a_killed_actor_equals_no_ray(
    many_shards: Path, tiny: Model, tmp_path: Path, environment: None
) -> None:
    slowly = ["--scoring.batch_size", "1", "--scoring.decode_threads", "2"]
    quiet = tmp_path / "quiet"
    assert run(PROGRAM, many_shards, *flags(tiny, quiet, *slowly)) == 0
    scores, log, json_file = tmp_path / "scores", tmp_path / "log", tmp_path / "counts.json"
    call = on_ray(
        many_shards, tiny, scores, *slowly, "--scoring.actors", "2", "--json", str(json_file)
    )
    with started(python(*call), log) as process:
        wait_until(lambda: list(scores.glob("train/*.safetensors")), log)
        pid = actor_pids(log)[0]
        os.kill(pid, signal.SIGKILL)
        assert listeners(process.pid) <= LOOPBACK
        assert process.wait(WAIT_S) == 0, log.read_text()
    assert data_files(scores) == data_files(quiet)
    assert (scores / "scores.json").read_bytes() == (quiet / "scores.json").read_bytes()
    assert counts(json_file)["shards_retried"] in (1, 2)  # two are under way in each actor
    assert "an actor was lost at score train" in log.read_text()
    assert json.loads((scores / "scores.json").read_text())["splits"]["train"]["samples"] == 300


@pytest.mark.slow
def test_a_signal_keeps_what_is_committed(
    many_shards: Path, tiny: Model, tmp_path: Path, environment: None
) -> None:
    slowly = ["--scoring.batch_size", "1", "--scoring.decode_threads", "2"]
    scores, log = tmp_path / "scores", tmp_path / "log"
    with started(python(*on_ray(many_shards, tiny, scores, *slowly)), log) as process:
        wait_until(lambda: list(scores.glob("train/*.safetensors")), log)
        pid = actor_pids(log)[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 75, log.read_text()
    wait_until(lambda: not alive(pid), log)
    assert not (scores / "scores.json").exists()
    result = json.loads((scores / "score_clip.result.json").read_text())
    assert result["code"] == 75
    kept = set(data_files(scores))
    json_file = tmp_path / "counts.json"
    assert run(PROGRAM, many_shards, *flags(tiny, scores, *slowly, "--json", str(json_file))) == 0
    assert counts(json_file)["shards_skipped"] == len(kept) - 1  # without the text bank
    assert kept < set(data_files(scores))


@pytest.mark.slow
def test_an_actor_that_cannot_reach_the_store_is_replaced(
    dataset: Path, tiny: Model, tmp_path: Path, environment: None, moto_s3: S3Server
) -> None:
    """Driver and Ray are up when the store goes away: the actor is the first to ask it again."""
    root, log = moto_s3.url(), tmp_path / "log"
    assert run("pack", dataset, "--paths.dataset", root) == 0
    with (
        FaultProxy(moto_s3.endpoint) as proxy,
        moto_s3.environment(AWS_ENDPOINT_URL=proxy.endpoint),
    ):
        call = on_ray(dataset, tiny, tmp_path / "scores", "--paths.dataset", root)
        with started(python(*call), log) as process:
            wait_until(lambda: "SCORING ON THE CPU" in log.read_text(), log)
            proxy.faults = [Fault("away", match="", seconds=5.0)]
            assert process.wait(WAIT_S) == 0, log.read_text()
    assert "an actor was lost at open, a new one takes over" in log.read_text()
    assert "no answer from the store" in log.read_text()
    assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "plain")) == 0
    assert data_files(tmp_path / "scores") == data_files(tmp_path / "plain")


@pytest.mark.slow
def test_actors_share_a_gpu_and_one_that_cannot_be_placed_delays_nothing(
    tmp_path: Path, environment: None
) -> None:
    done = subprocess.run(
        python("-m", "tests.fixtures.ray_pretend_gpus"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["answers"] == 40
    assert [gpus for _, gpus in printed["places"]] == ["0", "0"]
    assert "3 actors need 1.5 GPUs, Ray has 1 at present" in done.stderr


def test_the_jobs_address_is_no_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match="ray job submit"):
        on_running_ray()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not on_running_ray()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert on_running_ray()


def test_relative_roots_are_refused_in_a_copy(
    dataset: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job with a working directory runs in a temporary copy of it."""
    config = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    monkeypatch.chdir(dataset.parent)
    vectors = ["--object-vectors", "vectors.safetensors"]
    for call in (flags(tiny, "relative"), flags(tiny, dataset.parent / "s", *vectors)):
        assert run(PROGRAM, dataset, *call) == 64
        assert "temporary copy" in capsys.readouterr().err
    assert not Path("vectors.safetensors").exists()


def altered_copy(source: Path, target: Path) -> tuple[Path, str]:
    """A dataset with a byte changed in its first training shard, and that shard's name."""
    shutil.copytree(source, target)
    shard = sorted(target.glob("train/shards/*.tar"))[0]
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.seek(700)
        file.write(b"altered")
    return target, shard.name


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def listeners(pid: int) -> set[str]:
    """Addresses (hex, as in /proc) on which a process or its descendants listen."""
    family, inodes = {pid}, set()
    while True:
        more = set()
        for one in family:
            for file in Path(f"/proc/{one}/task").glob("*/children"):
                more |= {int(child) for child in file.read_text().split()}
        if more <= family:
            break
        family |= more
    for one in family:
        for entry in Path(f"/proc/{one}/fd").glob("*"):
            try:
                inodes.add(os.readlink(entry))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].split(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def submitted(command: list[str], log: Path) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, repeated while the head that has just started cannot take jobs yet."""
    done: list[subprocess.CompletedProcess[str]] = []

    def taken() -> bool:
        done.append(
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
        )
        return "No available agent" not in done[-1].stderr

    wait_until(taken, log)
    return done[-1]


@pytest.mark.slow
def test_submitted_as_a_job(
    dataset: Path,
    tiny: Model,
    tmp_path: Path,
    environment: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subprocess.run(["bash", "-n", str(HEAD)], check=True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as in clusters/README.md
    port, dashboard, client, agent = free_ports(4)
    log, address = tmp_path / "head.log", f"http://127.0.0.1:{dashboard}"
    head = [
        str(HEAD),
        *("--port", str(port), "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)),
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *("--num-cpus", "1", "--num-gpus", "0", "--object-store-memory", "100000000"),
        *("--temp-dir", os.environ["RAY_TMPDIR"] + "/t"),
    ]
    with started(head, log) as process:
        submit = ["ray", "job", "submit", "--address", address, "--"]
        wait_until(lambda: "Ray runtime started" in log.read_text(), log)
        # Room for one of the three actors: those that wait for a place hold no shards.
        crowded = ["--scoring.actors", "3", "--scoring.cpus_per_actor", "1"]
        called = on_ray(dataset, tiny, tmp_path / "scores", *crowded)
        done = submitted([*submit, "python", *called], log)
        assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
        assert "score_clip: done: shards_scored 4" in done.stdout
        assert listeners(process.pid) <= LOOPBACK
        # An error inside an actor keeps its code and its line, without Ray's traceback.
        altered, shard = altered_copy(dataset.parent / "dataset", tmp_path / "altered")
        refused = [*called, "--paths.dataset", str(altered), "--paths.scores", str(tmp_path / "s2")]
        done = submitted([*submit, "python", *refused], log)
        assert done.returncode == 1  # Ray's answer to any failure
        result = json.loads((tmp_path / "s2" / "score_clip.result.json").read_text())
        assert result["code"] == 65 and "crc32" in result["reason"] and shard in result["reason"]
        assert "\n" not in result["reason"]
        process.terminate()
        process.wait(WAIT_S)
    assert run(PROGRAM, dataset, *flags(tiny, tmp_path / "plain")) == 0
    assert data_files(tmp_path / "scores") == data_files(tmp_path / "plain")
