"""Files below clusters/: they parse, Ray accepts them, they hold no secret, commands exist."""

import copy
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from vlal_dist.config.load import CommandLine, parse_command_line
from vlal_dist.score_clip import PROGRAM

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "clusters"
AUTOSCALER = CLUSTERS / "ray" / "autoscaler.yaml"
HEAD = CLUSTERS / "ray" / "start-local-head.sh"
RAYJOB = CLUSTERS / "kuberay" / "score-clip.yaml"
IN_IMAGE = "/opt/vlal-dist"
YAMLS = sorted(CLUSTERS.rglob("*.yaml"))
TEXTS = sorted(path for path in CLUSTERS.rglob("*") if path.is_file())
COMMAND = re.compile(r"python -m vlal_dist\.score_clip ([^`\n]+)")


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def leaves(node: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a YAML document with its path."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{where}.{key}")
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, f"{where}[]")
    else:
        yield where, node


def commands(text: str) -> list[str]:
    """Every call of the program in a text or comment, continued lines joined, without its name."""
    joined = re.sub(r"\\\n[ #]*", "", text)
    return [found.split("  #")[0] for found in COMMAND.findall(joined)]


def parse(arguments: str, monkeypatch: pytest.MonkeyPatch, *, folder: Path = ROOT) -> CommandLine:
    monkeypatch.chdir(folder)
    argv = shlex.split(arguments.replace(IN_IMAGE, str(ROOT)))
    return parse_command_line(argv, flags=PROGRAM.flags, sections=PROGRAM.sections)


def documented(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CommandLine]:
    """The calls of the program in one file, as the program itself would read them."""
    in_copy = "--working-dir configs" in path.read_text(encoding="utf-8")
    folder = ROOT / "configs" if in_copy else ROOT
    found = commands(path.read_text(encoding="utf-8"))
    return [parse(arguments, monkeypatch, folder=folder) for arguments in found]


def check_remote_job(line: CommandLine, *, actors: int) -> None:
    """Roots that every node sees, an absolute cache, and as many actors as GPUs."""
    paths, scoring = line.config.paths, line.config.scoring
    assert paths.dataset.startswith("s3://") and paths.scores.startswith("s3://")
    assert Path(paths.cache).is_absolute()
    assert scoring.actors == actors
    assert scoring.weights is not None and scoring.use_ray and scoring.device == "auto"


def test_all_files_are_known() -> None:
    assert sorted([AUTOSCALER, RAYJOB]) == YAMLS
    table = re.findall(r"^\| `([\w./-]+)` \|", (CLUSTERS / "README.md").read_text(), re.MULTILINE)
    files = {path.relative_to(CLUSTERS).as_posix() for path in TEXTS}
    assert set(table) == files - {"README.md"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_are_ours(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documented(path, monkeypatch)
    for name in re.findall(r"\bclusters/[\w./-]+\w", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_command_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(
        "#   x -- \\\n#       python -m vlal_dist.score_clip --a b \\\n#     --c d  # e\n"
    )
    assert found == ["--a b --c d"]
    with pytest.raises(ValueError, match=r"unknown key scoring\.actor;"):
        parse("--config configs/vaw.yaml --scoring.actor 4", monkeypatch)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_no_secrets(path: Path) -> None:
    secret = re.compile(
        r"AKIA[0-9A-Z]{16}|AWS_(ACCESS|SECRET|SESSION)|RAY_AUTH_TOKEN\b|[0-9a-f]{32}"
    )
    for where, value in leaves(read(path)):
        assert "env_vars" not in where and "runtimeEnv" not in where
        assert not secret.search(f"{where} {value}"), where


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_placeholders_are_obvious(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "Search for CHANGE-ME" in text
    for where, value in leaves(read(path)):
        if "CHANGE-ME" in str(value):
            continue
        assert not re.search(r"<\w+>|\b(ami-|vpc-|subnet-|sg-)\w|arn:aws|x{4}|TODO", str(value)), (
            where
        )


def test_ray_accepts_the_autoscaler_file() -> None:
    config = prepare_config(copy.deepcopy(read(AUTOSCALER)))
    validate_config(config)
    # Ray fills absent keys from its own defaults, which install Ray by another pip.
    commands_run = [*config["head_setup_commands"], *config["worker_setup_commands"]]
    assert commands_run == [*config["setup_commands"]] * 2
    assert not config["docker"]


@pytest.mark.parametrize("change", [{"max_workers": "4"}, {"provider": {}}, {"autoscaling": True}])
def test_rays_check_can_fail(change: dict[str, object]) -> None:
    config = prepare_config(copy.deepcopy(read(AUTOSCALER)))
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**config, **change})


def test_autoscaler_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(AUTOSCALER)
    head, gpu = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert set(config["available_node_types"]) == {"head", "gpu"}
    assert config["head_node_type"] == "head"
    assert (head["resources"]["GPU"], head["min_workers"], head["max_workers"]) == (0, 0, 0)
    assert gpu["resources"]["GPU"] >= 1
    assert 0 == gpu["min_workers"] <= gpu["max_workers"] == config["max_workers"]
    assert config["idle_timeout_minutes"] > 0 and config["upscaling_speed"] > 0
    assert head["node_config"]["ImageId"] == gpu["node_config"]["ImageId"]
    assert head["node_config"]["IamInstanceProfile"] == gpu["node_config"]["IamInstanceProfile"]
    (line,) = documented(AUTOSCALER, monkeypatch)
    check_remote_job(line, actors=gpu["max_workers"] * gpu["resources"]["GPU"])


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_autoscaler_starts_ray_with_a_token(kind: str) -> None:
    config = read(AUTOSCALER)
    (start,) = config[f"{kind}_start_ray_commands"]
    assert "ray stop" not in start
    exported = re.search(r"export ([^;]+);", start)
    assert exported is not None and start.index("export ") < start.index("ray start ")
    variables = dict(word.split("=", 1) for word in shlex.split(exported.group(1)))
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert variables["PATH"].startswith("$HOME/venv/bin:")
    assert variables["AWS_DEFAULT_REGION"] == config["provider"]["region"]
    flags = shlex.split(start[start.index("ray start ") :])
    if kind == "head":
        assert {"--head", "--disable-usage-stats", "--dashboard-host=127.0.0.1"} <= set(flags)
        assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in flags
    else:
        assert "--address=$RAY_HEAD_IP:6379" in flags
    assert start.index("chmod 600 ~/.ray/auth_token;") < start.index("ray start ")
    # The same token on every machine and here, by its path.
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("before", [None, pytest.param(0o644, marks=pytest.mark.slow)])
def test_the_local_head_keeps_its_token_to_the_user(tmp_path: Path, before: int | None) -> None:
    """The script itself, up to the start of Ray, for which a program of that name stands."""
    tools, token = tmp_path / "bin", tmp_path / ".ray" / "auth_token"
    tools.mkdir()
    real = Path(sys.executable).parent / "ray"
    (tools / "ray").write_text(f'#!/bin/sh\n[ "$1" = start ] || exec {real} "$@"\n')
    (tools / "ray").chmod(0o755)
    if before is not None:
        token.parent.mkdir()
        token.write_text("0" * 64)
        token.chmod(before)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    script = ["bash", "-c", f"umask 022; exec {CLUSTERS}/ray/start-local-head.sh"]
    subprocess.run(script, env=environment, check=True, capture_output=True)
    assert token.stat().st_mode & 0o777 == 0o600
    assert (token.read_text() == "0" * 64) == (before is not None)
    if before is None:
        # From its creation, not by a later change.
        (made,) = [line for line in HEAD.read_text().splitlines() if "--generate" in line]
        assert made.strip().startswith("(umask 077 &&")
        assert token.parent.stat().st_mode & 0o777 == 0o700


def test_rayjob_runs_our_program(monkeypatch: pytest.MonkeyPatch) -> None:
    job = read(RAYJOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    name, *_ = commands(spec["entrypoint"])
    assert spec["entrypoint"] == f"python -m vlal_dist.score_clip {name}"
    gpus = sum(
        group["maxReplicas"] * int(pod_container(group)["resources"]["limits"]["nvidia.com/gpu"])
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]
    )
    check_remote_job(parse(name, monkeypatch), actors=gpus)
    assert spec["shutdownAfterJobFinishes"] is True
    assert isinstance(spec["ttlSecondsAfterFinished"], int) and isinstance(
        spec["backoffLimit"], int
    )


def pod_container(group: dict[str, Any]) -> dict[str, Any]:
    """The only container of a group's pods."""
    (container,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def test_rayjob_cluster() -> None:
    cluster = read(RAYJOB)["spec"]["rayClusterSpec"]
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and cluster["rayVersion"] == pinned.group(1)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    head, (gpu,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in pod_container(head)["resources"]["limits"]
    assert int(pod_container(gpu)["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    assert 0 == gpu["minReplicas"] == gpu["replicas"] <= gpu["maxReplicas"]
    assert pod_container(head)["image"] == pod_container(gpu)["image"]
    for group in (head, gpu):
        container = pod_container(group)
        # Kubernetes takes only strings here; YAML would make numbers of them.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert all(isinstance(variable["value"], str) for variable in container["env"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        assert container["envFrom"] == [{"secretRef": {"name": "vlal-s3"}}]


def test_the_image_holds_what_the_job_names() -> None:
    text = (CLUSTERS / "kuberay" / "Dockerfile").read_text()
    assert f"COPY . {IN_IMAGE}\n" in text
    assert f"-c {IN_IMAGE}/constraints.txt '{IN_IMAGE}[score,s3]'\n" in text


def test_what_is_installed_can_score_on_s3(tmp_path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"score", "s3"} <= set(extras)
    (install,) = [line for line in read(AUTOSCALER)["setup_commands"] if "pip install" in line]
    # What the shell makes of it: the one wheel of the mounted folder, with both extras.
    folder = tmp_path / "vlal-dist" / "wheel"
    folder.mkdir(parents=True)
    (folder / "vlal_dist-1.0-py3-none-any.whl").touch()
    command = install.replace("~/venv/bin/python", "printf '%s\\n'")
    shown = subprocess.run(
        ["bash", "-c", command], env={"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert shown.stdout.splitlines()[-1] == f"{folder}/vlal_dist-1.0-py3-none-any.whl[score,s3]"
    prose = " ".join((CLUSTERS / "README.md").read_text().split())
    assert "pip install 'vlal-dist[score,s3]'" in prose


def test_pods_have_no_privileges() -> None:
    """The user of the image, no capability, and no file system to write but two folders."""
    cluster = read(RAYJOB)["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    dockerfile = (CLUSTERS / "kuberay" / "Dockerfile").read_text(encoding="utf-8")
    (user,) = re.findall(r"useradd --create-home --uid (\d+) ray", dockerfile)
    for pod in (group["template"]["spec"] for group in groups):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == int(user)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] and own["capabilities"] == {"drop": ["ALL"]}
        assert own["allowPrivilegeEscalation"] is False
        mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        assert mounted == {"tmp": "/tmp", "home": "/home/ray"}
        assert {one["name"] for one in pod["volumes"]} == set(mounted)
    sidecar = cluster["autoscalerOptions"]["securityContext"]
    assert sidecar == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_base_image_is_named_by_its_digest() -> None:
    """Nothing is built on a tag, which may be another image tomorrow."""
    lines = (CLUSTERS / "kuberay" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("ARG", "FROM"))] == [
        "ARG BASE",
        "FROM ${BASE}",
    ]
