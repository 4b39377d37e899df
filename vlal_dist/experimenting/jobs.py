"""Tau of Eq. (2) of the likelihoods that training reads, for the rows at other temperatures."""

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import vlal_dist
from vlal_dist.data.format.dataset import open_dataset
from vlal_dist.data.format.scores import finished_manifest
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.storage.store import open_store


def stored_temperature(*, dataset_url: str, scores_url: str | None, cache: Path) -> float:
    """The scorer's, as merge or score_clip recorded it.

    Args:
        dataset_url: merged dataset.
        scores_url: score root, where the likelihoods come from there; None: from the tars.
        cache: local folder for index files.

    Raises:
        DataError: samples without likelihood, or scoring has not finished.
    """
    if scores_url is not None:
        return float(finished_manifest(open_store(scores_url))["temperature"])
    likelihood = open_dataset(dataset_url, cache=cache).manifest["likelihood"]
    if likelihood is None:
        raise DataError(
            f"{dataset_url} holds samples without likelihood; run score_clip and shard_tools "
            "merge, or point paths.merged at what merge wrote"
        )
    return float(likelihood["temperature"])


EXECUTION = frozenset(
    {
        "data.threads",
        "data.cache_bytes",
        "data.decoded_bytes",
        "training.threads",
        "training.log_steps",
        "training.checkpoint_epochs",
        "training.checkpoint_steps",
        "training.keep_checkpoints",
        "method.psl_prior",
    }
)
"""Keys that do not decide what is learned (the prior's place follows from the root)."""


def flat_settings(sections: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Dotted key -> value of everything that decides a run's result, in the given order."""
    flat = {
        f"{section}.{key}": value
        for section, keys in sections.items()
        for key, value in keys.items()
    }
    return {key: value for key, value in flat.items() if key not in EXECUTION}


def check_same(recorded: Mapping[str, object], now: Mapping[str, object], *, where: str) -> None:
    """Refuse to count a run that was trained with other settings.

    Args:
        recorded: `flat_settings` of the configuration that training wrote.
        now: those of the run as it would be started now.
        where: the run root, for the error.

    Raises:
        ConfigError: names the first key that differs, both values, and the remedy.
    """
    for key, value in now.items():
        if recorded.get(key) != value:
            raise ConfigError(
                f"{where} was trained with {key} {recorded.get(key)!r}, now it is {value!r}; set "
                "it back, or give another paths.experiments"
            )


QUEUED, LOG, FAILED, SECONDS = "queued.yaml", "log.txt", "failed.json", "seconds.json"
TEST = "evaluation/test-model"
TRAIN = "evaluation/train-model"
PACKAGE = Path(vlal_dist.__file__).resolve().parent


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
        """What the screen calls it."""
        return f"{self.variant} seed {self.seed}"


@dataclass(frozen=True)
class Place:
    """What one of the jobs running at a time may use.

    Attributes:
        ranks: DeepSpeed ranks.
        devices: CUDA devices by number, one per rank; empty: CPU.
        cores: of this job.
    """

    ranks: int
    devices: tuple[str, ...]
    cores: int


@dataclass(frozen=True)
class Step:
    """One command of a run.

    Attributes:
        name: prior, train or evaluate.
        command: as it is started.
        environment: of it.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str]


def state_of(job: Job) -> str:
    """`done`, `failed`, `begun` or `to do`, by what lies in the run's folder."""
    if is_done(job):
        return "done"
    if (job.root / FAILED).is_file():
        return "failed"
    return "begun" if (job.root / LOG).is_file() else "to do"


def is_done(job: Job) -> bool:
    """Whether the test result is there, with complete labels where they are configured."""
    result = read_json(job.root / TEST / "result.json")
    return result is not None and (not job.truth or result.get("truth") is not None)


def steps_of(job: Job, place: Place) -> list[Step]:
    """The commands that are still to run, in order."""
    steps = []
    if job.prior is not None and not (job.prior / TRAIN / "result.json").is_file():
        steps.append(_evaluate("prior", job.prior, "train", place, "--evaluation.truth", "none"))
    if (read_json(job.root / "train.result.json") or {}).get("code") != 0:
        steps.append(_train(job, place))
    steps.append(_evaluate("evaluate", job.root, "test", place))
    return steps


def places(jobs: int, *, ranks: int, devices: Sequence[str], cores: int) -> list[Place]:
    """The machine's devices and cores, dealt to so many jobs at a time.

    Args:
        jobs: at a time.
        ranks: of each.
        devices: CUDA devices that may be used, `ranks` at least; empty: CPU. With fewer than
            jobs x ranks, jobs share devices.
        cores: of the machine.
    """
    return [
        Place(
            ranks=ranks,
            devices=tuple(devices[(job * ranks + rank) % len(devices)] for rank in range(ranks))
            if devices
            else (),
            cores=max(1, cores // jobs),
        )
        for job in range(jobs)
    ]


def cuda_devices(ranks: int) -> list[str]:
    """CUDA devices of this machine, by number; none: training runs on the CPU.

    Raises:
        ConfigError: fewer than `ranks`, and some.
    """
    import torch  # seconds; only where something is trained

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    if len(found) < ranks:
        raise ConfigError(
            f"experiments.ranks is {ranks} and {len(found)} CUDA devices are visible; lower it"
        )
    return found


def read_json(path: Path) -> dict[str, object] | None:
    """An object in a file; None if there is none, or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _train(job: Job, place: Place) -> Step:
    environment = _environment()
    where = ["--num_accelerators", str(place.ranks)]
    if place.devices:
        # The launcher takes device numbers, not those that this variable has left over.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        where = ["--include", f"localhost:{','.join(place.devices)}"]
    else:
        environment["DS_ACCELERATOR"] = "cpu"
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    program = [str(PACKAGE / "train.py"), "--config", str(job.root / QUEUED)]
    command = [launcher, *where, "--master_port", str(_free_port()), *program]
    return Step("train", command, environment)


def _evaluate(name: str, root: Path, split: str, place: Place, *more: str) -> Step:
    environment = _environment()
    if place.devices:
        environment["CUDA_VISIBLE_DEVICES"] = place.devices[0]
    environment.setdefault("OMP_NUM_THREADS", str(place.cores))
    command = [sys.executable, "-m", "vlal_dist.evaluate", "--config", str(root / QUEUED)]
    command += ["--evaluation.split", split, "--evaluation.predictor", "model", *more]
    return Step(name, command, environment)


def _environment() -> dict[str, str]:
    """Ours, with the interpreter's programs and this very package found first."""

    def first(path: Path, name: str) -> str:
        return os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))

    return {
        **os.environ,
        "PATH": first(Path(sys.executable).parent, "PATH"),
        "PYTHONPATH": first(PACKAGE.parent, "PYTHONPATH"),
    }


def _free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
