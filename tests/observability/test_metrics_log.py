import json
from pathlib import Path

from vlal_dist.observability.metrics_log import MetricsLog, lines_until


def test_the_log_is_appended_to_locally_and_replaced_remotely(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    handed_on: list[object] = []
    local = MetricsLog(
        kept=b'{"step": 1}\n',
        append_to=path,
        replace=path.write_bytes,  # type: ignore[arg-type]
        also=handed_on.append,
    )
    local.write({"step": 2, "loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert handed_on == [{"step": 2, "loss": 0.5}]
    uploads: list[bytes] = []
    remote = MetricsLog(kept=b"", append_to=None, replace=uploads.append, also=handed_on.append)
    remote.write({"step": 1})
    assert uploads == [b""]
    remote.flush()
    assert uploads[-1] == b'{"step": 1}\n'


def test_a_resumed_run_keeps_the_lines_up_to_its_step() -> None:
    data = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste'
    assert lines_until(data, step=2) == b'{"step": 1}\n{"step": 2}\n'
