"""A real Prometheus on loopback, with the shipped files at a test's pace."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "clusters"
PROMETHEUS = CLUSTERS / "prometheus"
RULES = PROMETHEUS / "rules" / "vlal.yml"
DASHBOARDS = sorted((CLUSTERS / "grafana" / "dashboards").glob("*.json"))

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus and promtool (Debian: prometheus)",
)


def read_yaml(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def rules() -> list[dict[str, Any]]:
    """Every shipped rule, recording and alerting."""
    return [rule for group in read_yaml(RULES)["groups"] for rule in group["rules"]]


WATCHED = [path for path in DASHBOARDS if path.stem not in ("batch", "score")]
"""Dashboards of what ranks export; Ray exports scoring, node_exporter programs that end."""


def expressions(dashboard: Path) -> list[tuple[str, str]]:
    """Title and expression of every target of every panel."""
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    return [(p["title"], target["expr"]) for p in panels for target in p["targets"]]


def quick(folder: Path, *, node: str | None = None) -> Path:
    """The shipped configuration and rules at a second's pace, targets in `folder/<job>`.

    Args:
        folder: for the files of this server.
        node: address of a node_exporter; None: there is none.
    """
    config = read_yaml(PROMETHEUS / "prometheus.yml")
    config["global"] = dict.fromkeys(config["global"], "1s")
    for job in config["scrape_configs"]:
        if "static_configs" in job:
            job["static_configs"] = [{"targets": [node] if node else []}]
            continue
        (discovery,) = job["file_sd_configs"]
        (folder / job["job_name"]).mkdir()
        discovery["files"] = [str(folder / job["job_name"] / Path(discovery["files"][0]).name)]
        discovery["refresh_interval"] = "1s"
    shipped = read_yaml(RULES)
    for group in shipped["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    (folder / "rules").mkdir()
    (folder / "rules" / RULES.name).write_text(yaml.safe_dump(shipped))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yml"


class Prometheus:
    """What a test asks a server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer of its API."""
        where = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(where, timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{query}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression, now."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def check_panel(self, title: str, expression: str, *, window: str = "10s") -> None:
        """A panel's expression parses and finds numbers; rates are those of a window."""
        asked = expression.replace("$__rate_interval", window).replace("$run", ".*")
        assert "$" not in asked, title
        found = self.query(asked)
        assert found, f"{title}: {asked} finds nothing"
        assert all(series["value"][1] != "NaN" for series in found), f"{title}: {asked}"

    def firing(self, name: str) -> list[dict[str, str]]:
        """Labels of an alert's firing instances."""
        alerts = self.get("alerts")["alerts"]
        labels = [one["labels"] for one in alerts if one["state"] == "firing"]
        return [one for one in labels if one["alertname"] == name]


@contextlib.contextmanager
def running(config: Path) -> Iterator[Prometheus]:
    """Start a server, wait until it answers; end it by its process."""
    address = f"127.0.0.1:{free_port()}"
    log = config.parent / "prometheus.log"
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address={address}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, f"--storage.tsdb.path={config.parent / 'data'}"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Prometheus(f"http://{address}")
    try:
        wait_until(lambda: answers(server), what=f"Prometheus is ready ({log})")
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(server: Prometheus) -> bool:
    with contextlib.suppress(OSError, AssertionError):
        server.query("vector(1)")
        return True
    return False


def wait_until(true: Callable[[], object], *, what: str, seconds: float = 60.0) -> float:
    """Wait for something; returns the seconds it took."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - started
