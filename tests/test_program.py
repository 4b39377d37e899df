"""The runner of programs: closing line, exit codes, result files, the outcome for Prometheus."""

import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from vlal_dist.config.load import CommandLine, load_config
from vlal_dist.config.sections import Config
from vlal_dist.errors import DataError, NotFoundError, StorageError
from vlal_dist.observability.logs import lasting_streams
from vlal_dist.program import (
    CLOSING,
    EXIT_FILE,
    Counts,
    Program,
    closing_line,
    locked_places,
    run_program,
)
from vlal_dist.storage import lock
from vlal_dist.storage.lock import writer_lock


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


@pytest.mark.parametrize(
    ("error", "more", "noted"),
    [
        (NotFoundError("no such root"), (), True),
        (NotFoundError("no such root"), ("--paths.export", "here"), False),
        (StorageError("a full disk"), (), False),
    ],
)
def test_an_error_without_any_configuration_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    more: tuple[str, ...],
    noted: bool,
) -> None:
    def call(config: Config, flags: Mapping[str, str]) -> Counts:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLAL_CONFIG", raising=False)
    assert run_program(Program("try", "try", "try", ("paths",), _output, call), more) == 74
    assert ("neither --config FILE nor VLAL_CONFIG was given" in capsys.readouterr().err) is noted


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


PLAIN = Program("try", "try", "try", ("paths",), _output, lambda config, flags: {})


def test_the_closing_line_is_short() -> None:
    counts: Counts = {"samples": 5, "path": "x" * 300, "quality": {"auc": 0.51234567, "by": {}}}
    counts |= {f"count_{number}": number for number in range(90)} | {"seconds": 1.25}
    line = closing_line(PLAIN, counts)
    assert line.startswith("try: done: samples 5, quality (auc 0.51235, by 0), count_0 0, ")
    assert 180 < len(line) <= CLOSING and line.endswith(", seconds 1.25")
    chosen = replace(PLAIN, shown=("quality.auc", "samples", "absent"))
    assert closing_line(chosen, counts) == "try: done: quality auc 0.51235, samples 5, seconds 1.25"
    unlike = {"things": 2, "seconds": 1.0}  # of another mode of the program
    assert closing_line(chosen, unlike) == "try: done: things 2, seconds 1"


def test_nested_counts_are_numbers_of_entries() -> None:
    counts: Counts = {"quarantined": {"train": {"0f": "why", "1a": "why"}}, "seconds": 0}
    assert closing_line(PLAIN, counts) == "try: done: quarantined (train 2), seconds 0"


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


LOUD = """
import logging, sys
from vlal_dist.observability.logs import Progress
from vlal_dist.program import Program, run_program

def work(config, flags):
    with Progress("try", total=3, unit="things", every_s=0) as progress:
        for number in range(3):
            logging.getLogger("x").warning("x" * 5000)
            print("y" * 70_000, "\\udcff")
            sys.stderr.write("z")
            progress.advance()
    return {"things": 3}

program = Program("try", "try", "try", ("paths",), lambda config, flags: config.paths.run, work)
sys.exit(run_program(program, sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["2>&-", "<&- >&- 2>&-", "gone", "full"])
def test_closed_streams_change_nothing(tmp_path: Path, how: str) -> None:
    (tmp_path / "c.yaml").write_text("training: {seed: 1}\n")
    text, file = tmp_path / "text", tmp_path / "code"
    words = ["--config", str(tmp_path / "c.yaml"), "--paths.run", str(tmp_path / "run")]
    words += ["--observability.textfiles", str(text)]
    call = shlex.join([sys.executable, "-c", LOUD, *words])
    # The reader has left before anything is written; or there is no room for what is written.
    shell = {"gone": f"({call}) 2>&1 | true", "full": f"{call} > /dev/full 2> /dev/full"}
    script = f"set -o pipefail; {shell.get(how, f'{call} {how}')}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=Path(__file__).parents[1],
        env={**os.environ, EXIT_FILE: str(file)},
        timeout=60,
    )
    assert done.returncode == 0
    assert file.read_text() == "0"
    result = json.loads((tmp_path / "run/try.result.json").read_text())
    assert result["code"] == 0 and result["counts"]["things"] == 3
    assert "vlal_job_exit_code" in textfile(text)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "try.result.json",
        "try.config.yaml",
    }


def test_what_cannot_be_encoded_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    with lasting_streams():
        print("photo \udcff.jpg")
        print("and on")
    assert written.getvalue() == b"photo \\udcff.jpg\nand on\n"


def test_a_stream_without_a_descriptor_that_is_closed_opens_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    before = len(os.listdir("/proc/self/fd"))
    with lasting_streams():
        stream.close()
        for _ in range(20):
            print("unheard")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_root_in_use_is_refused_and_keeps_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome(tmp_path, None)
    before = (tmp_path / "try.result.json").read_bytes()
    monkeypatch.setattr(lock, "GRACE_S", 0.1)
    with writer_lock(str(tmp_path), program="train"):
        text = ("--observability.textfiles", str(tmp_path / "text"))
        assert outcome(tmp_path, ValueError("was started"), *text)[0] == 74
        assert outcome(tmp_path, None, "--plan")[0] == 0  # only reads
    assert f"train (process {os.getpid()} on " in capsys.readouterr().err
    assert (tmp_path / "try.result.json").read_bytes() == before
    assert textfile(tmp_path / "text") == ""


def test_remedies_are_printed_only_where_they_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(error: OSError) -> str:
        assert outcome(tmp_path, error)[0] == 74
        return capsys.readouterr().err

    assert "disk is full" in shown(OSError(28, "No space left on device"))
    assert "set TMPDIR to" in shown(OSError("AF_UNIX path too long"))
    assert shown(OSError(5, "Input/output error")).endswith("Input/output error\n")


@pytest.mark.parametrize(
    ("module", "places"),
    [
        ("vlal_dist.train", [("ROOT/run", "")]),
        ("vlal_dist.evaluate", [("ROOT/run", "evaluation/test-model")]),
        ("vlal_dist.report", [("ROOT/run", "report")]),
        ("vlal_dist.export", [("ROOT/export", ""), ("ROOT/run", "export")]),
        ("vlal_dist.score_clip", [("ROOT/scores", "")]),
        ("vlal_dist.predict", [("out", "predict here")]),
        ("shard_tools.pack", [("ROOT/dataset", "")]),
        ("shard_tools.clean.program", [("ROOT/instances", "")]),
        ("shard_tools.merge", [("ROOT/merged", "")]),
        ("shard_tools.reshard", [("ROOT/resharded", "")]),
        ("shard_tools.verify", []),
        ("shard_tools.inspect_dataset", []),
    ],
)
def test_what_each_program_locks(module: str, places: list[tuple[str, str]]) -> None:
    chosen = importlib.import_module(module).PROGRAM
    config = load_config(
        None, {"paths.root": "ROOT", "predict.output": "out/here.csv"}, sections=()
    )
    assert [tuple(one) for one in locked_places(chosen, CommandLine(config, {}))] == places


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
