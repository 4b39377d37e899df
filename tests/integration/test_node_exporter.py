"""A real node_exporter and Prometheus show how programs ended, and what pack counts."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.prometheus_server import (
    DASHBOARDS,
    ROOT,
    Prometheus,
    expressions,
    needs_prometheus,
    quick,
    running,
    wait_until,
)
from tests.fixtures.rank_processes import free_port
from tests.fixtures.tiny_vaw import write_small_vaw

EXPORTER = "prometheus-node-exporter"
ROWS = 3 * (24 + 6 + 8)

pytestmark = [
    needs_prometheus,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which(EXPORTER) is None, reason=f"no node_exporter (Debian: {EXPORTER})"
    ),
]


@contextlib.contextmanager
def node_exporter(folder: Path) -> Iterator[str]:
    """The collector alone, on loopback; its address."""
    address = f"127.0.0.1:{free_port()}"
    command = [EXPORTER, "--collector.disable-defaults", "--collector.textfile"]
    command += [f"--collector.textfile.directory={folder}", f"--web.listen-address={address}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: shown(address), what="node_exporter answers")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def shown(address: str) -> str:
    with contextlib.suppress(OSError):
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
            text: str = response.read().decode()
        return text
    return ""


def tool(name: str, config: Path, *more: str) -> int:
    command = [sys.executable, "-m", "shard_tools", name, "--config", str(config), *more]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, check=False)
    return done.returncode


def value(server: Prometheus, expression: str) -> float | None:
    found = server.query(expression)
    return float(found[0]["value"][1]) if found else None


def test_what_programs_left_is_scraped_and_a_failure_alarms_until_the_next_success(
    tmp_path: Path,
) -> None:
    config, text = write_small_vaw(tmp_path / "small"), tmp_path / "text"
    text.mkdir()
    told = ("--observability.textfiles", str(text))
    root = str(tmp_path / "small" / "dataset")
    pack = f'job_name="pack", run="{root}"'
    with node_exporter(text) as address, running(quick(tmp_path, node=address)) as server:

        def code() -> float | None:
            return value(server, f"vlal_job_exit_code{{{pack}}}")

        def last_success() -> float | None:
            return value(server, f"vlal_job_last_success_timestamp_seconds{{{pack}}}")

        assert tool("clean", config, *told) == 0
        assert tool("pack", config, *told) == 0
        wait_until(lambda: code() == 0, what="pack is done")
        instances = f'sum(vlal_pack_instances_total{{run="{root}"}})'
        wait_until(lambda: value(server, instances) == ROWS, what="all rows are counted")
        for dashboard in DASHBOARDS:
            if dashboard.stem == "batch":
                for title, expression in expressions(dashboard):
                    server.check_panel(title, expression)
        assert server.firing("VlalJobFailed") == []
        succeeded = last_success()
        assert succeeded == pytest.approx(time.time(), abs=60)

        assert tool("pack", config, *told, "--pack.jpeg_quality", "80") == 65  # other settings
        wait_until(lambda: server.firing("VlalJobFailed"), what="the alarm")
        (labels,) = server.firing("VlalJobFailed")
        assert (labels["job_name"], labels["run"]) == ("pack", root)
        assert code() == 65 and last_success() == succeeded

        assert tool("pack", config, *told) == 0
        wait_until(lambda: not server.firing("VlalJobFailed"), what="its end")
        again = last_success()
        assert again is not None and succeeded is not None and again > succeeded
        assert value(server, "node_textfile_scrape_error") == 0

        text_of = shown(address)
    ours = [line for line in text_of.splitlines() if line.lstrip("#HELPTY ").startswith("vlal_")]
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input="\n".join(ours) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr
    assert len(ours) > 10
