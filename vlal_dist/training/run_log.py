"""What a run reports: Prometheus metrics, metrics.jsonl, trackers, log lines, the progress bar."""

import contextlib
import errno
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import vlal_dist
from vlal_dist import __version__
from vlal_dist.config.sections import ObservabilityConfig
from vlal_dist.data.loading.loader import TrainLoader
from vlal_dist.errors import ConfigError, NotFoundError, Stopped, StorageError, VlalError
from vlal_dist.method.metrics import AttributeScores, Evaluation
from vlal_dist.observability.logs import Progress
from vlal_dist.observability.metric_definitions import LOSS_TERMS, TERM_KINDS
from vlal_dist.observability.metrics import TrainMetrics
from vlal_dist.observability.metrics_log import METRICS, MetricsLog, lines_until
from vlal_dist.observability.prometheus_files import Target
from vlal_dist.observability.tracker_process import ProcessTracker
from vlal_dist.observability.trackers import Tracker, Trackers
from vlal_dist.storage.s3_counts import REASONS, process_counts
from vlal_dist.storage.store import Store
from vlal_dist.training.checkpoint import TrainState
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.step import TrainStep

logger = logging.getLogger(__name__)

STARTS = "starts.jsonl"
IDENTITY = "trackers.json"
SHOWN_RATES = {"base_decay": "backbone", "fast_decay": "head"}
"""Parameter groups whose learning rates are shown, and under which name."""


class RunLog:
    """Reports of a run: of each rank to its metrics, of rank 0 to all the rest.

    Args:
        stack: closes the trackers.
        config: which trackers.
        ranks: this process among its peers.
        store: the run root.
        metrics: of this rank.
        step: step that this start continues from; later lines of metrics.jsonl are removed.
    """

    def __init__(
        self,
        stack: ExitStack,
        config: ObservabilityConfig,
        ranks: Ranks,
        *,
        store: Store,
        metrics: TrainMetrics,
        step: int,
    ) -> None:
        self._ranks, self._metrics = ranks, metrics
        self._file: MetricsLog | None = None
        if ranks.rank == 0:
            trackers = open_trackers(
                stack, config.trackers, store=store, step=step, metrics=metrics
            )
            self._file = MetricsLog(store, step=step, also=trackers.log)
        self._progress: Progress | None = None
        self._epoch, self._samples, self._started = "", 0, 0.0

    @contextlib.contextmanager
    def epoch(self, name: str, *, samples: int) -> Iterator[None]:
        """Time the samples of an epoch and show their progress.

        Args:
            name: such as `epoch 1/12`.
            samples: of the epoch, over all ranks, that are left.
        """
        self._epoch, self._samples, self._started = name, 0, time.monotonic()
        if self._ranks.rank != 0:
            yield
            return
        with Progress(name, total=samples, unit="samples") as self._progress:
            yield

    def advance(self, samples: int) -> None:
        """Count samples of a finished step, over all ranks."""
        self._samples += samples
        if self._progress is not None:
            self._progress.advance(samples)

    def interval(
        self,
        state: TrainState,
        train_step: TrainStep,
        loader: TrainLoader,
        *,
        rates: Mapping[str, float],
    ) -> None:
        """Report the steps since the last call; every rank must call, with settled ledgers.

        Args:
            rates: learning rate of each parameter group.
        """
        own = train_step.take_tally()
        means = own.over_ranks(self._ranks).per_row()
        shown = {name: rates[group] for group, name in SHOWN_RATES.items() if group in rates}
        metrics = self._metrics
        metrics.interval(
            loss={
                "total": means["loss"],
                **{term: means[f"loss_{term}"] for term in LOSS_TERMS if term != "total"},
            },
            rates=shown,
            term_counts=dict(zip(TERM_KINDS, (int(n) for n in own.pairs.tolist()), strict=True)),
            ignored=means["ignored_effective"],
            grad_norm=train_step.grad_norm(),
            visits={"trained": state.ledger.count, "left_out": state.left_out.count},
            quarantined=len(state.quarantined),
        )
        metrics.times(train_step.take_times())
        metrics.loader(loader.numbers())
        seconds = max(time.monotonic() - self._started, 1e-9)
        if self._file is not None:
            self._file.write(
                {
                    "kind": "train",
                    "epoch": state.epoch,
                    "step": state.step,
                    **means,
                    "ledger": asdict(state.ledger),
                    "quarantined": len(state.quarantined),
                    "samples_per_s": self._samples / seconds,
                    "lr": shown,
                }
            )
        if self._progress is not None:
            self._progress.label = f"{self._epoch}, loss {means['loss']:.4g}"
        self._samples, self._started = 0, time.monotonic()

    def validation(
        self,
        state: TrainState,
        evaluation: Evaluation,
        *,
        split: str,
        mean_ap: float | None,
        best: bool,
    ) -> None:
        """Report the scores of the validation split; `best`: the highest mAP so far.

        Of an undefined mAP (None) the latest model is the best.
        """
        groups, overall = evaluation.groups, evaluation.groups["overall"]
        by_group = {name: float(g["mAP"]) for name, g in groups.items() if g["mAP"] is not None}
        self._metrics.validation(
            split=split, mean_ap=by_group, attributes=attribute_status(evaluation.attributes)
        )
        if self._file is not None:
            record: dict[str, object] = {
                "kind": "validation",
                "epoch": state.epoch,
                "step": state.step,
                **overall,
            }
            record |= {"mAP": mean_ap, "groups": by_group, "best": best}
            self._file.write({**record, "unannotated": state.unannotated})
            self.flush()
        place = f"epoch {state.epoch + 1}, step {state.step}"
        if mean_ap is None:
            logger.info("%s: mAP undefined on %s, the latest model is kept", place, split)
            return
        logger.info(
            "%s: mAP %.4f on %s over %s attributes%s%s",
            place,
            mean_ap,
            split,
            overall["num_classes"],
            ", unannotated pairs as negatives" if state.unannotated == "negative" else "",
            ", the best so far" if best else f", best {state.best_map:.4f}",
        )

    def cut(self, rates: Mapping[str, float]) -> None:
        """Log that the plateau schedule has cut rates; `rates`: of each parameter group, now."""
        named = ((SHOWN_RATES[group], rates[group]) for group in SHOWN_RATES if group in rates)
        shown = ", ".join(f"{name} {rate:.3g}" for name, rate in named)
        logger.info("plateau: learning rates cut: %s", shown)

    def flush(self) -> None:
        """Upload metrics.jsonl to a remote run root; a failure is logged and stops nothing."""
        if self._file is not None:
            self._file.flush()


def attribute_status(scores: AttributeScores) -> dict[str, int]:
    """How many attributes have an AP, and why the others have none; sums to A."""
    positive, negative = scores.num_positive > 0, scores.num_negative > 0
    return {
        "scored": int((positive & negative).sum()),
        "no_positive": int((~positive & negative).sum()),
        "no_negative": int((positive & ~negative).sum()),
        "unannotated": int((~positive & ~negative).sum()),
    }


def failure_reason(error: VlalError) -> str:
    """Which of `SAVE_FAILURES` an error of a store is."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    return "io" if isinstance(error, StorageError) else "other"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot work here, before anything of a run is written.

    Raises:
        ConfigError: a library is not installed, or MLflow has no address.
    """
    for name in names:
        if name != "tensorboard" and not _is_installed(name):  # it is on by default
            raise ConfigError(
                f"observability.trackers has {name}, which is not installed; "
                "run: pip install 'vlal-dist[trackers]', or take it off the list"
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "observability.trackers has mlflow, but MLFLOW_TRACKING_URI is not set; "
            "export MLFLOW_TRACKING_URI=http://HOST:PORT"
        )


def _is_installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # a mere folder is no package


def open_trackers(
    stack: ExitStack, names: Sequence[str], *, store: Store, step: int, metrics: TrainMetrics
) -> Trackers:
    """Start the trackers of a run; on rank 0 alone.

    Args:
        stack: closes them.
        names: `observability.trackers`.
        store: the run root.
        step: step that this start continues from; 0: the trackers begin a new run.
        metrics: counts dropped records.
    """
    local = store.local_path(IDENTITY)
    starts: dict[str, Callable[[], Tracker]] = {}
    if clients := [name for name in ("wandb", "mlflow") if name in names]:
        identity = identity_of(store, step=step)
        folder = local.parent if local else None
        for name in clients:
            starts[name] = partial(ProcessTracker, name, identity=identity, folder=folder)
    if "tensorboard" in names and not _is_installed("tensorboard"):
        logger.info(
            "tensorboard is not installed: no event files (metrics.jsonl has all numbers); for "
            "them: pip install 'vlal-dist[train]'"
        )
    elif "tensorboard" in names and local:
        starts["tensorboard"] = partial(_event_files, local.parent / "tensorboard", step=step)
    elif "tensorboard" in names:
        logger.info("tensorboard: event files are local only; none for %s", store.url)
    trackers = Trackers(starts, dropped=metrics.tracker_dropped)
    stack.push(lambda kind, *_: trackers.close(done=kind is None))
    return trackers


def _event_files(folder: Path, *, step: int) -> Tracker:
    from vlal_dist.observability.event_files import EventFiles

    return EventFiles(folder, step=step)


def identity_of(store: Store, *, step: int) -> str:
    """The name of this run in W&B and MLflow, the same at every resume.

    Args:
        store: the run root, where it is kept.
        step: step that this start continues from; at 0 the run gets a new name.
    """
    try:
        if step:
            return str(json.loads(store.read(IDENTITY))["identity"])
    except NotFoundError:
        pass  # the run began without them
    except (VlalError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: %s; the trackers begin a new run", IDENTITY, error)
    identity = secrets.token_hex(8)
    try:
        store.replace(IDENTITY, (json.dumps({"identity": identity}) + "\n").encode())
    except VlalError as error:
        logger.warning("%s: %s; a resume will begin a new run in the trackers", IDENTITY, error)
    return identity


def open_metrics(
    stack: ExitStack,
    config: ObservabilityConfig,
    ranks: Ranks,
    *,
    store: Store,
    cache: Path,
    kernel: str,
) -> TrainMetrics:
    """The metrics of this rank, served and announced if the configuration says so.

    Args:
        stack: closes the endpoint. The announcement is removed first, unless an error ends the run:
            then it stays, and Prometheus reports the rank as down.
        config: address, and port of local rank 0; the others follow.
        ranks: this process among its peers.
        store: the run root.
        cache: `paths.cache`; its disk is watched.
        kernel: name of the backend that computes the selective loss.
    """
    disks = {"cache": cache, "run": store.local_path(METRICS)}
    metrics = TrainMetrics(
        {
            "version": __version__,
            "torch": torch.__version__,
            "deepspeed": importlib.metadata.version("deepspeed"),
            "kernel": kernel,
        },
        read=partial(storage_readings, disks),
    )
    stack.callback(metrics.close)
    if not config.metrics:
        return metrics
    port = metrics.serve(host=config.metrics_host, port=config.metrics_port + ranks.local_rank)
    if port is not None and config.targets is not None:
        target = Target(Path(config.targets), run=store.url, role="train", rank=ranks.rank)
        target.write(host=config.metrics_host, port=port)
        target.remove_others(world_size=ranks.world_size)

        def end(kind: type[BaseException] | None, *_: object) -> None:
            if kind is None or issubclass(kind, Stopped):
                target.remove()

        stack.push(end)
    return metrics


def storage_readings(disks: Mapping[str, Path | None]) -> dict[tuple[str, ...], float]:
    """Values of the metrics of `STORAGE`, now.

    Args:
        disks: value of label `mount` -> a path on it, which need not exist; None: not local.
    """
    counts = process_counts()
    readings: dict[tuple[str, ...], float] = {
        ("vlal_s3_requests_total",): counts.requests,
        ("vlal_s3_bytes_total", "in"): counts.bytes_in,
        ("vlal_s3_bytes_total", "out"): counts.bytes_out,
    }
    for reason in REASONS:
        readings["vlal_s3_retries_total", reason] = counts.repeated.get(reason, 0)
    for mount, path in disks.items():
        if path is None:
            continue
        path = path.absolute()
        with contextlib.suppress(OSError):  # a disk that is gone has no reading
            there = next(one for one in (path, *path.parents) if one.exists())
            readings["vlal_disk_free_bytes", mount] = shutil.disk_usage(there).free
    return readings


def record_start(store: Store, ranks: Ranks, *, step: int, kernel: str) -> None:
    """Add a line to `starts.jsonl` on rank 0: version, hardware, ranks and backend of this start.

    Args:
        store: the run root.
        ranks: this process among its peers.
        step: step that this start continues from; lines of later steps are removed.
        kernel: backend of the selective loss.
    """
    if ranks.rank != 0:
        return
    on_gpu = ranks.device.type == "cuda"
    record = {
        "step": step,
        "version": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else _processor(),
        "ranks": ranks.world_size,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "kernel": kernel,
    }
    kept = lines_until(store, STARTS, step=step)
    store.replace(STARTS, kept + (json.dumps(record) + "\n").encode())


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, `-dirty` if altered; None elsewhere."""
    root = Path(vlal_dist.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # a parent's repository would be somebody else's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    """The processor's name in /proc/cpuinfo, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
