"""Metrics of a training rank, and its endpoint under scrapers that misbehave."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.fixtures.rank_exporter import BUILD, PROCESS, Exporter
from tests.fixtures.rank_processes import ROOT, free_port
from tests.fixtures.scrapers import hanging, scrape
from vlal_dist.observability.metric_definitions import LOADER, STORAGE, TRAIN
from vlal_dist.observability.metrics import TrainMetrics

COUNTED = """
import sys
from prometheus_client import generate_latest
from tests.fixtures.rank_exporter import Exporter
metrics = Exporter().metrics
metrics.step(epoch=0, step=1, rows=1, wait_s=0.0, duration_s=0.1)
sys.stdout.buffer.write(generate_latest(metrics.registry))
"""
HALF = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
WHOLE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def values(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def served(metrics: TrainMetrics) -> int:
    port = metrics.serve(host="127.0.0.1", port=free_port())
    assert port is not None
    return port


@pytest.fixture(scope="module")
def text() -> str:
    """A scrape of a rank on which every event has happened."""
    exporter = Exporter()
    try:
        port = served(exporter.metrics)
        exporter.begin()
        for _ in range(2):
            exporter.step()
        exporter.rarely()
        return scrape(port)
    finally:
        exporter.metrics.close()


def test_a_scrape_shows_what_was_counted(text: str) -> None:
    found = values(text)
    expected = {
        'vlal_build_info{deepspeed="0",kernel="cpu",torch="2",version="0.1"}': 1,
        'vlal_run_state{state="training"}': 1,
        'vlal_run_state{state="init"}': 0,
        'vlal_resume_total{kind="exact"}': 1,
        'vlal_resume_total{kind="fallback"}': 0,
        "vlal_train_steps_total": 2,
        "vlal_train_samples_total": 10,
        "vlal_train_epoch": 3,
        "vlal_train_global_step": 2,
        'vlal_train_loss{term="total"}': 2.5,
        'vlal_train_learning_rate{group="head"}': 7e-4,
        "vlal_train_step_duration_seconds_count": 2,
        "vlal_train_compute_seconds_sum": 0.3,
        "vlal_train_compute_seconds_count": 2,
        "vlal_train_allreduce_seconds_sum": 0.04,
        "vlal_train_grad_norm": 0.5,
        "vlal_train_ignored_attributes": 10.5,
        'vlal_train_label_terms_total{kind="ignored"}': 8,
        'vlal_train_ledger_visits{kind="trained"}': 10,
        "vlal_train_quarantined_samples": 1,
        "vlal_train_nonfinite_steps_total": 1,
        "vlal_loader_wait_seconds_count": 2,
        "vlal_loader_samples_total": 2,
        "vlal_loader_ready_steps": 2,
        'vlal_eval_map_ratio{group="overall",split="val"}': 0.25,
        'vlal_eval_attributes{status="scored"}': 7,
        "vlal_checkpoint_size_bytes": 2_000_000,
        "vlal_checkpoint_duration_seconds_sum": 1.5,
        'vlal_checkpoint_failures_total{reason="disk_full"}': 1,
        'vlal_signal_received_total{signal="SIGTERM"}': 1,
        'vlal_tracker_dropped_total{tracker="mlflow"}': 2,
        'vlal_tracker_dropped_total{tracker="wandb"}': 0,
        "vlal_s3_requests_total": 20,
        'vlal_s3_bytes_total{direction="in"}': 2e6,
        'vlal_disk_free_bytes{mount="cache"}': 1e9,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["vlal_train_last_step_timestamp_seconds"] > 1e9
    assert found["vlal_checkpoint_last_success_timestamp_seconds"] > 1e9


def test_a_scrape_holds_every_name_with_its_kind_and_text_and_no_other(text: str) -> None:
    types = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    names = {**TRAIN, **LOADER, **STORAGE, **PROCESS}
    assert types == {name: metric.kind for name, metric in names.items()}
    for name, metric in {**TRAIN, **LOADER, **STORAGE}.items():
        assert helps[name] == metric.text


def test_a_rank_has_few_series(text: str) -> None:
    assert 100 < len(values(text)) <= 200


def test_counters_are_there_before_anything_is_counted() -> None:
    metrics = TrainMetrics(BUILD, read=dict)
    port = served(metrics)
    try:
        found = values(scrape(port))
    finally:
        metrics.close()
    assert found['vlal_checkpoint_failures_total{reason="io"}'] == 0
    assert found['vlal_train_label_terms_total{kind="positive"}'] == 0
    assert found["vlal_train_nonfinite_steps_total"] == 0
    assert "vlal_s3_requests_total" not in found  # `read` omits it


@pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
@pytest.mark.parametrize("folder", ["there", "absent", "a file", ""])
def test_a_folder_for_several_processes_means_nothing_to_a_rank(
    tmp_path: Path, name: str, folder: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a file").touch()
    place = str(tmp_path / folder) if folder else ""
    variables = {name: place, "PROMETHEUS_DISABLE_CREATED_SERIES": "false"}
    for _ in range(2):  # a second process of the same number would go on from the first's files
        done = subprocess.run(
            [sys.executable, "-c", COUNTED],
            env={**os.environ, **variables, "http_proxy": "http://127.0.0.1:1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "_created" not in done.stdout
        found = values(done.stdout)
        assert found["vlal_train_steps_total"] == 1
        assert found["vlal_train_step_duration_seconds_count"] == 1
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("host", ["a..b", "nul\0", "x" * 300])
def test_a_host_that_is_no_name_is_only_warned_of(
    caplog: pytest.LogCaptureFixture, host: str
) -> None:
    assert Exporter().metrics.serve(host=host, port=9400) is None
    assert "training goes on" in caplog.text


def test_an_unknown_label_is_counted() -> None:
    metrics = Exporter().metrics
    metrics.stopped_by("SIGHUP")
    name, label = "vlal_signal_received_total", {"signal": "SIGHUP"}
    assert metrics.registry.get_sample_value(name, label) == 1


def test_the_interval_between_checkpoints_is_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = Exporter()
    now = time.time()
    for seconds in (100.0, 130.0, 135.0):
        monkeypatch.setattr(time, "time", lambda at=now + seconds: at)
        exporter.metrics.saved(seconds=1.0, size_bytes=1)
    found = exporter.metrics.registry.get_sample_value("vlal_checkpoint_interval_seconds")
    assert found == pytest.approx(100.0, abs=1.0)


def test_a_taken_port_gives_the_next_one_and_no_port_only_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second, third = (Exporter().metrics for _ in range(3))
    port = served(first)
    try:
        following = second.serve(host="127.0.0.1", port=port)
        assert following is not None and following > port
        assert "vlal_train_steps_total" in values(scrape(following))
        assert third.serve(host="203.0.113.1", port=port) is None
        assert "training goes on" in caplog.text
    finally:
        first.close()
        second.close()


def test_a_host_without_an_address_is_asked_for_once(caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    assert Exporter().metrics.serve(host="no-such-host.invalid", port=9400) is None
    assert "set observability.metrics_host" in caplog.text
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "sent",
    [pytest.param(b"", marks=pytest.mark.slow), HALF, pytest.param(WHOLE, marks=pytest.mark.slow)],
    ids=["silent", "half a request", "no read"],
)
def test_hanging_scrapers_delay_neither_the_next_scrape_nor_the_end(sent: bytes) -> None:
    exporter = Exporter()
    port = served(exporter.metrics)
    with hanging(port, number=50, sent=sent):
        exporter.step()
        started = time.monotonic()
        assert values(scrape(port))["vlal_train_steps_total"] == 1
        exporter.metrics.close()
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("sent", [b"\x00\xff\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n", HALF])
def test_a_scrape_is_answered_after_garbage_and_cut_connections(sent: bytes) -> None:
    exporter = Exporter()
    port = served(exporter.metrics)
    try:
        with hanging(port, number=5, sent=sent):
            pass
        assert "vlal_train_steps_total" in values(scrape(port))
    finally:
        exporter.metrics.close()


def test_a_failed_scrape_does_not_stop_the_next() -> None:
    failures = [ValueError("broken")]

    def read() -> dict[tuple[str, ...], float]:
        if failures:
            raise failures.pop()
        return {("vlal_s3_requests_total",): 3.0}

    metrics = TrainMetrics(BUILD, read=read)
    port = served(metrics)
    try:
        with pytest.raises(AssertionError):
            scrape(port)
        assert values(scrape(port))["vlal_s3_requests_total"] == 3
    finally:
        metrics.close()


def test_it_listens_on_ipv6_too() -> None:
    metrics = Exporter().metrics
    port = metrics.serve(host="::1", port=free_port())
    try:
        with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert "vlal_train_steps_total" in values(answer.read().decode())
    finally:
        metrics.close()
