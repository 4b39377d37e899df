"""metrics.jsonl on local and remote run roots, and after a resume."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from vlal_dist.errors import StorageError
from vlal_dist.observability.metrics_log import METRICS, MetricsLog, lines_until
from vlal_dist.storage.local import LocalStore


class Remote(LocalStore):
    """A store without local paths, which can be out of reach."""

    away = False

    def local_path(self, key: str) -> Path | None:
        return None

    def replace(self, key: str, data: bytes) -> None:
        if self.away:
            raise StorageError("away")
        super().replace(key, data)


def ignore(record: object) -> None:
    pass


def test_the_log_is_appended_to_locally_and_replaced_remotely(tmp_path: Path) -> None:
    path, forwarded = tmp_path / METRICS, list[Any]()
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    local = MetricsLog(LocalStore(tmp_path), step=1, also=forwarded.append)
    local.write({"step": 2, "loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert forwarded == [{"step": 2, "loss": 0.5}]
    remote = MetricsLog(Remote(tmp_path), step=0, also=ignore)
    remote.write({"step": 1})
    assert path.read_bytes() == b""
    remote.flush()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_failed_upload_is_logged_and_retried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store = Remote(tmp_path)
    log = MetricsLog(store, step=0, also=ignore)
    log.write({"step": 1})
    store.away = True
    log.flush()
    assert "the next save retries: away" in caplog.text
    store.away = False
    log.flush()
    assert (tmp_path / METRICS).read_bytes() == b'{"step": 1}\n'


def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    store = LocalStore(tmp_path)
    assert lines_until(store, METRICS, step=2) == b'{"step": 1}\n{"step": 2}\n'
    assert lines_until(store, METRICS, step=0) == lines_until(store, "absent", step=2) == b""
