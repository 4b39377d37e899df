"""The whole pipeline as a user runs it, every root on a real Ceph gateway: `s3://` throughout.

clean, pack, verify, `ray job submit` of score_clip on a running head, merge, `deepspeed` on two
ranks, evaluate, report; and once more locally, in this process, for equal bytes.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.fixtures.ray_processes import ROOT, WAIT_S, started, wait_until
from tests.fixtures.tiny_vaw import run, write_small_vaw
from tests.integration.test_scoring_on_ray import HEAD, free_ports
from tests.scoring.conftest import environment, make_tiny_model
from vlal_dist.storage.store import open_store

__all__ = ["environment"]

pytestmark = [pytest.mark.ceph, pytest.mark.ray_cluster, pytest.mark.deepspeed]

ROOTS = ("instances", "dataset", "scores", "merged", "run")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_root_on_s3(
    ceph_s3: S3Server, tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_small_vaw(tmp_path, images={"train": 12, "val": 4, "test": 8})
    tiny = make_tiny_model(tmp_path / "clip", seed=7)
    # Equal settings give equal bytes; two warm-ups on a busy machine may choose different ones.
    scorer = [*tiny.flags(), "--scoring.batch_size", "8", "--scoring.decode_threads", "1"]
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "RAY_AUTH_MODE": "token",
    }.items():
        monkeypatch.setenv(name, value)
    url = ceph_s3.url()
    remote = [word for root in ROOTS for word in (f"--paths.{root}", f"{url}/{root}")]
    arguments = ["--config", str(config), *scorer, "--scoring.device", "cpu", *remote]
    _tool("clean", arguments)
    _tool("pack", arguments)
    _tool("verify", arguments)
    _submit(arguments, tmp_path)
    _tool("merge", arguments)
    _tool("verify", arguments)
    port = str(free_ports(1)[0])
    launcher = ("deepspeed", "--num_accelerators", "2", "--master_port", port)
    call(*launcher, "vlal_dist/train.py", *arguments)
    call(sys.executable, "-m", "vlal_dist.evaluate", *arguments)
    call(sys.executable, "-m", "vlal_dist.report", *arguments)
    with ceph_s3.environment():
        store = open_store(f"{url}/run")
        result = json.loads(store.read("evaluation/test-model/result.json"))
        assert result["num_samples"] == 24
        assert b"<html" in store.read("report.html")[:2000]
        assert any(key.endswith("/COMPLETE") for key in store.list_keys("checkpoints/"))
        stored = _digests(f"{url}/merged")
    local = [word for root in ROOTS for word in (f"--paths.{root}", str(tmp_path / root))]
    for stage in ("clean", "pack"):
        assert run(stage, config, *local) == 0
    assert run("vlal_dist.score_clip", config, *scorer, *local, "--scoring.use_ray", "false") == 0
    assert run("merge", config, *local) == 0
    assert stored == _digests(str(tmp_path / "merged"))
    assert ceph_s3.env["AWS_SECRET_ACCESS_KEY"] not in _everything(tmp_path)


def _submit(arguments: list[str], folder: Path) -> None:
    """Score as a job on a head that is running already, as users of a cluster do."""
    port, dashboard, client, agent = free_ports(4)
    head = [
        str(HEAD),
        *("--port", str(port), "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)),
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *("--num-cpus", "2", "--num-gpus", "0", "--object-store-memory", "100000000"),
        *("--temp-dir", os.environ["RAY_TMPDIR"] + "/t"),
    ]
    log = folder / "head.log"
    with started(head, log):
        wait_until(lambda: "Ray runtime started" in log.read_text(), log)
        address = f"http://127.0.0.1:{dashboard}"
        submit = ["ray", "job", "submit", "--address", address, "--", "python", "-m"]
        call(*submit, "vlal_dist.score_clip", *arguments)


def _tool(stage: str, arguments: list[str]) -> None:
    call(sys.executable, "-m", "shard_tools", stage, *arguments)


def call(*words: str) -> None:
    """Run a command from the repository's root; it must end with 0."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=2 * WAIT_S)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"


def _digests(url: str) -> dict[str, str]:
    """Every data file below a root -> sha256; results of programs hold times."""
    store = open_store(url)
    return {
        key: hashlib.sha256(store.read(key)).hexdigest()
        for key in store.list_keys()
        if ".result." not in key and ".config." not in key
    }


def _everything(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "".join(path.read_bytes().decode("latin-1") for path in files)
