"""A run on an MLflow server; only the process of `tracker_process.py` imports this."""

import os
import re

import mlflow
from mlflow.entities import Metric

from vlal_dist.observability.trackers import Record

IDENTITY = "vlal_run"
"""Tag by which a resumed run finds itself again."""
REFUSED = re.compile(r"[^\w. :/-]", re.ASCII)
"""What MLflow accepts in no name."""


class MlflowRun:
    """The run whose tag is `identity`, begun or continued.

    MLflow cannot take back what it has: what it was told of steps after the checkpoint stays, and
    those steps are not told again.

    Args:
        identity: of the run.

    Raises:
        MlflowException: the server does not answer as it should.
    """

    def __init__(self, identity: str) -> None:
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
        """Say how it ended."""
        self._client.set_terminated(self._run, status="FINISHED" if done else "FAILED")

    def abandon(self) -> None:
        """The process is ended from outside."""

    def _experiment(self) -> str:
        """As MLflow's own variables say; made if it is not there."""
        if chosen := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return chosen
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)
