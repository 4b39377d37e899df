"""Jobs of an experiment: state on disk, commands that are still to run, devices, checks."""

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vlal_dist
from vlal_dist.config.sections import DataConfig, ExperimentsConfig, PathsConfig
from vlal_dist.data.format.dataset import open_dataset
from vlal_dist.data.format.scores import finished_manifest
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.pipeline import NOT_DECISIVE
from vlal_dist.storage.store import open_store

QUEUED, LOG, FAILED, SECONDS = "queued.yaml", "log.txt", "failed.json", "seconds.json"
TEST = "evaluation/test-model"
TRAIN = "evaluation/train-model"
PACKAGE = Path(vlal_dist.__file__).resolve().parent

EXECUTION = NOT_DECISIVE | {"method.psl_prior"}
"""Keys that do not decide what is learned (the prior's place follows from the root)."""


@dataclass(frozen=True)
class Job:
    """One run: a row of a table and a seed.

    Attributes:
        variant: the row's name.
        seed: `training.seed`.
        root: run root.
        config_text: the resolved configuration as YAML.
        prior: run root whose model is evaluated on the training split first (PSL), or None.
        truth: complete labels are configured, so the result must hold `truth`.
    """

    variant: str
    seed: int
    root: Path
    config_text: str
    prior: Path | None
    truth: bool

    @property
    def title(self) -> str:
        """Name of the run on the screen."""
        return f"{self.variant} seed {self.seed}"


@dataclass(frozen=True)
class Place:
    """Resources of one of the jobs that run at a time.

    Attributes:
        ranks: DeepSpeed ranks.
        devices: CUDA devices by number, one per rank; empty: CPU.
        cores: CPU cores.
    """

    ranks: int
    devices: tuple[str, ...]
    cores: int


@dataclass(frozen=True)
class Command:
    """One command of a run, named prior, train or evaluate, with its environment."""

    name: str
    argv: list[str]
    environment: Mapping[str, str]


def state_of(job: Job) -> str:
    """`done`, `failed`, `started` or `to do`, by the files in the run's folder."""
    if is_done(job):
        return "done"
    if (job.root / FAILED).is_file():
        return "failed"
    return "started" if (job.root / LOG).is_file() else "to do"


def is_done(job: Job) -> bool:
    """Whether the test result is there, with complete labels where they are configured."""
    result = read_json(job.root / TEST / "result.json")
    return bool(result) and (not job.truth or result.get("truth") is not None)


def commands_of(job: Job, place: Place) -> list[Command]:
    """The commands that are still to run, in order."""
    commands = []
    if job.prior is not None and not (job.prior / TRAIN / "result.json").is_file():
        no_truth = ("--evaluation.truth", "none")
        commands.append(_evaluate("prior", job.prior, "train", place, *no_truth))
    if read_json(job.root / "train.result.json").get("code") != 0:
        commands.append(_train(job, place))
    commands.append(_evaluate("evaluate", job.root, "test", place))
    return commands


def places(config: ExperimentsConfig, *, devices: Sequence[str], cores: int) -> list[Place]:
    """The machine's devices and cores, divided among `config.jobs` jobs of `config.ranks` ranks.

    Args:
        config: section of the configuration.
        devices: CUDA devices that may be used; empty: CPU. With fewer than jobs x ranks, jobs
            share devices.
        cores: of the machine.

    Raises:
        ConfigError: some devices, but fewer than ranks.
    """
    if 0 < len(devices) < config.ranks:
        raise ConfigError(
            f"experiments.ranks is {config.ranks} and {len(devices)} CUDA devices are visible; "
            "lower it"
        )
    return [
        Place(
            ranks=config.ranks,
            devices=tuple(
                devices[(job * config.ranks + rank) % len(devices)]
                for rank in range(config.ranks if devices else 0)
            ),
            cores=max(1, cores // config.jobs),
        )
        for job in range(config.jobs)
    ]


def cuda_devices() -> list[str]:
    """CUDA devices of this machine, by number; none: training runs on the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and torch.cuda.is_available():
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def stored_temperature(data: DataConfig, paths: PathsConfig) -> float:
    """Tau of Eq. (2) of the likelihoods that training reads, as score or merge recorded it.

    Raises:
        DataError: samples without likelihood, or scoring has not finished.
    """
    if data.likelihood == "scores":
        return float(finished_manifest(open_store(paths.scores))["temperature"])
    url = next(iter(data.mix), paths.merged)
    likelihood = open_dataset(url, cache=Path(paths.cache)).manifest["likelihood"]
    if likelihood is None:
        raise DataError(
            f"{url} holds samples without likelihood; run vlal score and vlal merge, or "
            "point paths.merged at what merge wrote"
        )
    return float(likelihood["temperature"])


def check_config(
    recorded: Mapping[str, Mapping[str, object]],
    now: Mapping[str, Mapping[str, object]],
    *,
    where: str,
) -> None:
    """Refuse to count a run that was trained with other settings; keys of `EXECUTION` may differ.

    Args:
        recorded: section -> key -> value of the configuration that training wrote.
        now: that of the run as it would be started now.
        where: the run root, for the error.

    Raises:
        ConfigError: names the first key that differs, both values, and the remedy.
    """
    for section, values in now.items():
        for name, value in values.items():
            key, old = f"{section}.{name}", recorded[section].get(name)
            if key not in EXECUTION and old != value:
                raise ConfigError(
                    f"{where} was trained with {key} {old!r}, now it is {value!r}; set it back, or "
                    "give another paths.experiments"
                )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none, or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _train(job: Job, place: Place) -> Command:
    environment = _environment()
    where = ["--num_accelerators", str(place.ranks)]
    if place.devices:
        # The launcher numbers all devices of the machine, not those left by this variable.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        where = ["--include", f"localhost:{','.join(place.devices)}"]
    else:
        environment["DS_ACCELERATOR"] = "cpu"
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])  # free now
    program = [str(PACKAGE / "train.py"), "--config", str(job.root / QUEUED)]
    return Command("train", [launcher, *where, "--master_port", port, *program], environment)


def _evaluate(name: str, root: Path, split: str, place: Place, *more: str) -> Command:
    environment = _environment()
    if place.devices:
        environment["CUDA_VISIBLE_DEVICES"] = place.devices[0]
    environment.setdefault("OMP_NUM_THREADS", str(place.cores))
    argv = [sys.executable, "-m", "vlal_dist.evaluate", "--config", str(root / QUEUED)]
    argv += ["--evaluation.split", split, "--evaluation.predictor", "model", *more]
    return Command(name, argv, environment)


def _environment() -> dict[str, str]:
    """Environment in which this interpreter's programs and this package are found first."""

    def first(path: Path, name: str) -> str:
        return os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))

    return {
        **os.environ,
        "PATH": first(Path(sys.executable).parent, "PATH"),
        "PYTHONPATH": first(PACKAGE.parent, "PYTHONPATH"),
    }
