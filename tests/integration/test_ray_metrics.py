"""Metrics of a scoring driver reach a Prometheus that scrapes Ray's node."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.prometheus_server import (
    DASHBOARDS,
    ROOT,
    expressions,
    needs_prometheus,
    quick,
    running,
    wait_until,
)
from vlal_dist.observability.metric_definitions import SCORE

pytestmark = [needs_prometheus, pytest.mark.ray_cluster, pytest.mark.slow]


def test_every_panel_of_scoring_has_data(tmp_path: Path, environment: None) -> None:
    config = quick(tmp_path)
    (score,) = (path for path in DASHBOARDS if path.stem == "score")
    file = tmp_path / "ray" / "prom_metrics_service_discovery.json"
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.fixtures.ray_exporter", str(file)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
    )
    try:
        wait_until(file.exists, what="Ray has started", seconds=150)
        with running(config) as server:
            for name in SCORE:
                wait_until(lambda name=name: server.query(name), what=name, seconds=90)
            # Ray collects every ten seconds.
            moving = "sum(rate(ray_vlal_score_images_total[1m])) > 0"
            wait_until(lambda: server.query(moving), what="crops are counted", seconds=60)
            for title, expression in expressions(score):
                server.check_panel(title, expression, window="1m")
            for name, metric in SCORE.items():
                for label, values in metric.labels.items():
                    found = {series["metric"][label] for series in server.query(name)}
                    assert found == (set(values) or {"s3://bucket/scores"}), (name, label)
    finally:
        driver.communicate(b"", timeout=120)
    assert driver.returncode == 0
