"""Files for node_exporter: valid, complete at once, and never in the way of the work."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.fixtures.prometheus_server import needs_prometheus
from vlal_dist.observability.metric_definitions import JOB, PACK, Metric
from vlal_dist.observability.prometheus_files import TextFile, exposition, write_job_end

ROOT = 's3://b/"odd"\\root\n'


def end(folder: Path, code: int, *, root: str = "/data/d") -> dict[str, float]:
    """The values in the file after a run that ended with a code."""
    write_job_end(folder, program="pack", root=root, code=code, seconds=1.5)
    (path,) = folder.glob("vlal-pack-*.prom")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name.partition("{")[0]: float(v) for name, _, v in (x.rpartition(" ") for x in lines)}


def test_a_failed_run_keeps_when_it_last_succeeded(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    assert end(folder, 65) == {
        "vlal_job_last_success_timestamp_seconds": 0,
        "vlal_job_duration_seconds": 1.5,
        "vlal_job_exit_code": 65,
    }
    succeeded = end(folder, 0)["vlal_job_last_success_timestamp_seconds"]
    assert succeeded == pytest.approx(time.time(), abs=10)
    for code in (1, 75):
        after = end(folder, code)
        assert after["vlal_job_last_success_timestamp_seconds"] == succeeded
        assert after["vlal_job_exit_code"] == code
    (only,) = folder.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert only.stat().st_mode & 0o777 == 0o666 & ~umask  # node_exporter is another user


def test_an_odd_root_neither_breaks_the_format_nor_hides_the_last_success(tmp_path: Path) -> None:
    succeeded = end(tmp_path, 0, root=ROOT)["vlal_job_last_success_timestamp_seconds"]
    assert end(tmp_path, 1, root=ROOT)["vlal_job_last_success_timestamp_seconds"] == succeeded
    (path,) = tmp_path.iterdir()
    assert r'run="s3://b/\"odd\"\\root\n"' in path.read_text()


def test_roots_with_names_alike_have_files_of_their_own(tmp_path: Path) -> None:
    for root in ("/a/b", "/a-b", "s3://a/b"):
        write_job_end(tmp_path, program="pack", root=root, code=0, seconds=0)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"vlal_job_last_success_timestamp_seconds x"])
def test_a_damaged_file_is_written_anew(tmp_path: Path, damage: bytes) -> None:
    end(tmp_path, 0)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    assert end(tmp_path, 1)["vlal_job_last_success_timestamp_seconds"] == 0


def test_a_folder_that_cannot_be_written_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    file = TextFile(tmp_path / "file" / "below", what="pack", root="/d")
    for _ in range(3):
        file.write(JOB, {("vlal_job_exit_code", "pack", "/d"): 0})
    assert caplog.text.count("set observability.textfiles") == 1
    assert file.last_success() == 0


@needs_prometheus
def test_promtool_takes_it() -> None:
    tables: dict[str, Metric] = {**JOB, **PACK}
    readings = {
        (name, *(f"{ROOT}{n}" for n in range(len(metric.labels)))): 1e9 + 0.25
        for name, metric in tables.items()
    }
    text = exposition(tables, readings)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert text.count("1000000000.25") == len(tables)
