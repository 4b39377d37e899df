import json
import socket
import urllib.request
from pathlib import Path

import pytest

from vlal_dist.observability.metrics import MetricsLog, TrainMetrics, lines_until


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text = response.read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_scrape_shows_what_was_counted() -> None:
    metrics = TrainMetrics({"version": "0.1", "torch": "2"})
    port = metrics.serve(host="127.0.0.1", port=free_port())
    assert port is not None
    try:
        metrics.state("training")
        for step in (1, 2):
            metrics.step(epoch=3, step=step, rows=5, wait_s=0.002, duration_s=0.2)
        metrics.interval(
            loss={"total": 2.5, "positive": 1.0},
            rates={"head": 7e-4},
            term_counts={"positive": 4, "ignored": 30},
        )
        metrics.validation(split="val", mean_ap={"overall": 0.25})
        found = scrape(port)
    finally:
        metrics.close()
    expected = {
        'vlal_build_info{torch="2",version="0.1"}': 1,
        'vlal_run_state{state="training"}': 1,
        'vlal_run_state{state="init"}': 0,
        "vlal_train_steps_total": 2,
        "vlal_train_samples_total": 10,
        "vlal_train_epoch": 3,
        "vlal_train_global_step": 2,
        'vlal_train_loss{term="total"}': 2.5,
        'vlal_train_learning_rate{group="head"}': 7e-4,
        "vlal_train_step_duration_seconds_count": 2,
        'vlal_train_label_terms_total{kind="ignored"}': 30,
        "vlal_loader_wait_seconds_count": 2,
        'vlal_eval_map_ratio{group="overall",split="val"}': 0.25,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["vlal_train_last_step_timestamp_seconds"] > 1e9
    assert len(found) <= 200


def test_a_taken_port_gives_the_next_one_and_no_port_only_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second, third = (TrainMetrics({"version": "0.1"}) for _ in range(3))
    port = first.serve(host="127.0.0.1", port=free_port())
    assert port is not None
    try:
        following = second.serve(host="127.0.0.1", port=port)
        assert following is not None and following > port
        assert "vlal_train_steps_total" in scrape(following)
        assert third.serve(host="203.0.113.1", port=port) is None
        assert "training goes on" in caplog.text
    finally:
        first.close()
        second.close()


def test_the_log_is_appended_to_locally_and_replaced_remotely(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    local = MetricsLog(kept=b'{"step": 1}\n', append_to=path, replace=path.write_bytes)  # type: ignore[arg-type]
    local.write({"step": 2, "loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    uploads: list[bytes] = []
    remote = MetricsLog(kept=b"", append_to=None, replace=uploads.append)
    remote.write({"step": 1})
    assert uploads == [b""]
    remote.flush()
    assert uploads[-1] == b'{"step": 1}\n'


def test_a_resumed_run_keeps_the_lines_up_to_its_step() -> None:
    data = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste'
    assert lines_until(data, step=2) == b'{"step": 1}\n{"step": 2}\n'
