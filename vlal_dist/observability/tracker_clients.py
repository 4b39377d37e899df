"""Runs in W&B and MLflow, through their own clients; imported by `tracker_process.py` alone.

Neither can take records back: what was logged of steps after the checkpoint stays, and those steps
are not logged again.
"""

import json
import os
import re
from pathlib import Path

from vlal_dist.observability.trackers import Record, Tracker

IDENTITY = "vlal_run"
"""MLflow tag by which a resumed run is found again."""
REFUSED = re.compile(r"[^\w. :/-]", re.ASCII)
"""Characters that MLflow allows in no name."""


class WandbRun(Tracker):
    """The W&B run with an id, new or continued.

    Online W&B itself refuses steps that it has. Offline it does not know the files of earlier
    starts, so the last steps are noted beside them.

    Args:
        identity: id of the run.
        folder: in which W&B makes its folder `wandb`; None: as its own variables say.

    Raises:
        wandb.Error: no account, or no answer within W&B's own time for it.
    """

    def __init__(self, identity: str, *, folder: str | None) -> None:
        import wandb

        self._run = wandb.init(id=identity, resume="allow", dir=folder)
        self._note = Path(self._run.sync_dir).parent / f"{identity}.steps.json"
        self._had: dict[str, int] = {}
        if self._run.offline and self._note.exists():
            self._had = json.loads(self._note.read_text(encoding="utf-8"))

    def log(self, record: Record) -> None:
        """Hand a record to W&B's own process, which sends and keeps it."""
        if record.step <= self._had.get(record.kind, -1):
            return
        values = {f"{record.kind}/{name}": value for name, value in record.values.items()}
        self._run.log(values, step=record.step)
        if self._run.offline:
            self._had[record.kind] = record.step
            self._note.write_text(json.dumps(self._had), encoding="utf-8")

    def close(self, *, done: bool) -> None:
        """Send what is left and the outcome."""
        self._run.finish(exit_code=0 if done else 1)


class MlflowRun(Tracker):
    """The MLflow run whose tag is `identity`, new or continued.

    Args:
        identity: of the run.

    Raises:
        MlflowException: the server fails.
    """

    def __init__(self, identity: str) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        experiment = self._experiment()
        found = self._client.search_runs(
            [experiment], filter_string=f"tags.{IDENTITY} = '{identity}'", max_results=1
        )
        self._resumed = bool(found)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_RUN_NAME") or None
            run = self._client.create_run(experiment, tags={IDENTITY: identity}, run_name=name)
            self._run = run.info.run_id
        self._had: dict[str, int] = {}

    def log(self, record: Record) -> None:
        """Send a record, unless the run has that step already."""
        from mlflow.entities import Metric

        values = {REFUSED.sub("_", f"{record.kind}/{k}"): v for k, v in record.values.items()}
        if self._resumed and record.kind not in self._had:
            known = self._client.get_metric_history(self._run, next(iter(values)))
            self._had[record.kind] = max((metric.step for metric in known), default=-1)
        if record.step <= self._had.get(record.kind, -1):
            return
        at = int(record.time * 1000)
        metrics = [Metric(name, value, at, record.step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, done: bool) -> None:
        """Send the outcome."""
        self._client.set_terminated(self._run, status="FINISHED" if done else "FAILED")

    def _experiment(self) -> str:
        """The experiment that MLflow's own variables name; created if it does not exist."""
        if chosen := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return chosen
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)
