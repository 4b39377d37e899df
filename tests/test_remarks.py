"""Remarks: logged at once, kept once, repeated before the closing line, and recorded."""

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlal_dist.config.sections import Config
from vlal_dist.errors import DataError
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.remarks import LONGEST, MOST, collected_remarks, remark

logger = logging.getLogger(__name__)


def run(folder: Path, *texts: str, error: Exception | None = None, flags: tuple[str, ...] = ()) -> (
    tuple[int, dict[str, object]]
):  # fmt: skip
    def work(config: Config, flags: Mapping[str, str]) -> Counts:
        for text in texts:
            remark(logger, "a.setting", text)
        if error is not None:
            raise error
        return {"things": 3}

    program = Program(
        "try", "try", "try", ("paths",), lambda config, _: config.paths.run, work, ("json", "plan")
    )
    code = run_program(program, ["--config", "vaw", "--paths.run", str(folder), *flags])
    path = folder / "try.result.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_a_remark_is_logged_and_repeated_before_the_closing_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "counts.json"
    code, result = run(tmp_path, "a fifth is dropped; lower it", flags=("--json", str(file)))
    kept = [{"key": "a.setting", "text": "a fifth is dropped; lower it"}]
    assert code == 0 and result["warnings"] == kept
    assert json.loads(file.read_text())["warnings"] == kept
    out, err = capsys.readouterr()
    assert "WARNING tests.test_remarks: a fifth is dropped; lower it\n" in err
    first, last = out.splitlines()
    assert first == "try: warning: a fifth is dropped; lower it"
    assert last.startswith("try: done: things 3, ")


def test_a_program_without_remarks_prints_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "this one is of the run before")[0] == 0
    capsys.readouterr()
    assert run(tmp_path)[1]["warnings"] == []
    out, err = capsys.readouterr()
    assert "arning" not in out + err and len(out.splitlines()) == 1


def test_remarks_of_a_failure_and_of_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(tmp_path, "seen before", error=DataError("bad"))
    assert code == 65 and result["warnings"] == [{"key": "a.setting", "text": "seen before"}]
    before = (tmp_path / "try.result.json").read_bytes()
    capsys.readouterr()
    assert run(tmp_path, "of a plan", flags=("--plan",))[0] == 0
    assert "try: warning: of a plan\n" in capsys.readouterr().out
    assert (tmp_path / "try.result.json").read_bytes() == before


def test_equal_remarks_count_once_and_their_number_is_bounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with collected_remarks() as kept:
        for number in [*range(MOST + 5), 0, 1]:
            remark(logger, "key", "remark %d\nof %s", number, "100 %")
    assert [one.text for one in kept] == [f"remark {number} of 100 %" for number in range(MOST)]
    assert len(caplog.records) == MOST + 5  # those beyond are logged, too


def test_a_long_remark_keeps_its_remedy() -> None:
    with collected_remarks() as kept:
        remark(logger, "key", "%s; do this", "x" * 5000)
    assert len(kept[0].text) <= LONGEST and kept[0].text.endswith("; do this")


def test_credentials_in_a_remark_are_masked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path, "http://me:secret@host is not there")[1]
    assert "secret" not in json.dumps(result) + "".join(capsys.readouterr())


def test_one_rank_alone_remarks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with collected_remarks() as kept:
        monkeypatch.setenv("RANK", "1")
        remark(logger, "key", "of rank 1")
        monkeypatch.setenv("RANK", "0")
        remark(logger, "key", "of rank 0")
    assert [one.text for one in kept] == [one.message for one in caplog.records] == ["of rank 0"]


def test_remarks_of_threads_are_kept_and_those_outside_of_a_run_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with collected_remarks() as kept, ThreadPoolExecutor(1) as pool:
        pool.submit(remark, logger, "key", "on a thread").result()
        with collected_remarks() as inner:
            remark(logger, "key", "inside")
    remark(logger, "key", "of a library call")
    assert [one.text for one in kept] == ["on a thread"]
    assert [one.text for one in inner] == ["inside"]
    assert [one.message for one in caplog.records][-1] == "of a library call"
