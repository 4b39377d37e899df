"""The runner of programs: closing line, exit codes, result files, the outcome for Prometheus."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from vlal_dist.config.sections import Config
from vlal_dist.errors import DataError
from vlal_dist.program import EXIT_FILE, Counts, Program, run_program


def outcome(folder: Path, work: object, *more: str) -> tuple[int, dict[str, object]]:
    (folder / "c.yaml").write_text("training: {seed: 1}\n")

    def call(config: Config, flags: Mapping[str, str]) -> Counts:
        if isinstance(work, BaseException):
            raise work
        return {"samples": 170407, "share": 0.123456789, "splits": {"train": 1234.5678}}

    program = Program("try", "try", "try", ("paths",), _output, call, ("json", "plan"))
    arguments = ["--config", str(folder / "c.yaml"), "--paths.run", str(folder), *more]
    code = run_program(program, arguments)
    path = folder / "try.result.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def _output(config: Config, flags: Mapping[str, str]) -> str:
    return config.paths.run


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("bad"), 65), (OSError(28, "No space left on device"), 74), (ValueError("bug"), 1)],
)
def test_errors_end_with_a_code_that_is_in_the_result(
    tmp_path: Path, error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(tmp_path, None)[1]["code"] == 0
    found, result = outcome(tmp_path, error)
    assert found == result["code"] == code and str(error) in str(result["reason"])
    assert (tmp_path / "try.config.yaml").exists()  # of the success before
    assert str(error) in capsys.readouterr().err


def test_the_supervisor_gets_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    outcome(tmp_path, DataError("bad"))
    assert (tmp_path / "code").read_text() == "65"
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "no/such/folder"))
    assert outcome(tmp_path, None)[0] == 0


def test_the_closing_line_rounds_and_the_result_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = outcome(tmp_path, None)[1]["counts"]
    assert isinstance(counts, dict) and counts["share"] == 0.123456789
    line = capsys.readouterr().out
    assert line.startswith("try: done: samples 170407, share 0.12346, splits (train 1234.6), s")


def test_an_interruption_can_be_continued(tmp_path: Path) -> None:
    assert outcome(tmp_path, KeyboardInterrupt())[0] == 75


def test_a_plan_leaves_the_record_of_what_was_done(tmp_path: Path) -> None:
    outcome(tmp_path, None)
    before = (tmp_path / "try.result.json").read_bytes()
    assert outcome(tmp_path, None, "--plan")[0] == 0
    assert (tmp_path / "try.result.json").read_bytes() == before


def test_counts_that_cannot_be_written_end_with_an_io_error(tmp_path: Path) -> None:
    code, result = outcome(tmp_path, None, "--json", str(tmp_path / "no/such/file"))
    assert code == 74 and result["code"] == 0
    assert outcome(tmp_path, None, "--json", str(tmp_path / "n.json"))[0] == 0
    assert json.loads((tmp_path / "n.json").read_text())["samples"] == 170407


def textfile(folder: Path) -> str:
    """The program's file for node_exporter; empty where there is none."""
    found = [path.read_text() for path in folder.glob("vlal-try-*.prom")]
    return found[0] if found else ""


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (None, 0),
        (DataError("bad"), 65),
        (OSError(28, "No space left on device"), 74),
        (ValueError("bug"), 1),
        (KeyboardInterrupt(), 75),
    ],
)
def test_the_textfile_has_the_outcome(tmp_path: Path, work: object, code: int) -> None:
    folder = tmp_path / "text"
    assert outcome(tmp_path, work, "--observability.textfiles", str(folder))[0] == code
    label = f'{{job_name="try",run="{tmp_path}"}}'
    assert f"vlal_job_exit_code{label} {code}\n" in textfile(folder)
    assert (f"vlal_job_last_success_timestamp_seconds{label} 0.0\n" in textfile(folder)) == bool(
        code
    )


def test_a_plan_and_a_wrong_command_write_no_textfile(tmp_path: Path) -> None:
    text = ("--observability.textfiles", str(tmp_path / "text"))
    assert outcome(tmp_path, None, "--plan", *text)[0] == 0
    assert outcome(tmp_path, None, "--no-such-flag", *text)[0] == 2
    assert outcome(tmp_path, None, "--paths.no_such_key", "1", *text)[0] == 64
    assert outcome(tmp_path, None)[0] == 0
    assert textfile(tmp_path / "text") == ""


def test_a_file_that_cannot_be_written_changes_no_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    text = ("--observability.textfiles", str(tmp_path / "file"))
    assert outcome(tmp_path, None, *text)[0] == 0
    assert "set observability.textfiles" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module",
    [
        f"shard_tools.{name}"
        for name in ("clean.program", "inspect_dataset", "merge", "pack", "reshard")
    ]
    + ["shard_tools.verify"]
    + [f"vlal_dist.{name}" for name in ("evaluate", "export", "predict", "report", "score_clip")]
    + ["vlal_dist.train"],
)
def test_every_program_writes_textfiles(module: str) -> None:
    assert "observability" in importlib.import_module(module).PROGRAM.sections
