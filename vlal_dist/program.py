"""What every program does around its work: parse, log, run, report, exit with the right code.

A program is a function `(Config, flags) -> counts`; `run_program` turns its errors into one clear
line and an exit code (design 9), prints the closing summary, writes `result.json`, and tells
Prometheus how it ended where `observability.textfiles` says so.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlal_dist.config.load import CommandLine, config_yaml, help_text, parse_command_line
from vlal_dist.config.sections import Config
from vlal_dist.errors import Stopped, StorageError, VlalError
from vlal_dist.observability.logs import setup_logging
from vlal_dist.observability.prometheus_files import write_job_end
from vlal_dist.storage.store import open_store

EXIT_FILE = "VLAL_EXIT_FILE"
"""Variable by which `supervise` asks a program for its exit code."""

Counts = dict[str, object]
Work = Callable[[Config, Mapping[str, str]], Counts]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """The face of one program.

    Attributes:
        name: short name, first word of the closing summary.
        usage: the command as users type it.
        purpose: one paragraph for `--help`.
        sections: config sections it reads.
        flags: flags without a dot that it takes.
        output: the root it writes, by config and flags: where `result.json` and the config go.
        work: the work itself; returns the closing counts.
        needs_config: False: outside of the repository it runs on the defaults.
    """

    name: str
    usage: str
    purpose: str
    sections: tuple[str, ...]
    flags: tuple[str, ...]
    output: Callable[[Config, Mapping[str, str]], str]
    work: Work
    needs_config: bool = True


def run_program(program: Program, argv: Sequence[str], *, quiet: bool = False) -> int:
    """Run one program and return its exit code.

    Args:
        program: what to run.
        argv: command line without the program's name.
        quiet: no summary and no result files (ranks other than 0).
    """
    code = _run(program, argv, quiet=quiet)
    told = os.environ.get(EXIT_FILE)
    if told and not quiet:
        # Launchers change exit codes; the supervisor acts on this one. If it is not told, it must
        # do with theirs.
        with contextlib.suppress(OSError):
            Path(told).write_text(str(code), encoding="ascii")
    return code


def _run(program: Program, argv: Sequence[str], *, quiet: bool) -> int:
    if "--help" in argv or "-h" in argv:
        text = help_text(
            usage=program.usage,
            purpose=program.purpose,
            sections=program.sections,
            flags=program.flags,
        )
        sys.stdout.write(text + "\n")
        return 0
    setup_logging()
    started = time.monotonic()
    try:
        line = _parse(program, argv)
    except (VlalError, OSError) as error:
        sys.stderr.write(f"{program.name}: error: {error}\n")
        return error.exit_code if isinstance(error, VlalError) else StorageError.exit_code
    code = _work(program, line.config, line.flags, started=started, quiet=quiet)
    if not quiet and "plan" not in line.flags:
        _write_end(program, line, code=code, seconds=time.monotonic() - started)
    return code


def _work(
    program: Program, config: Config, flags: Mapping[str, str], *, started: float, quiet: bool
) -> int:
    """Run the program's work, print the summary and write `result.json`; the exit code."""
    try:
        counts = program.work(config, flags)
    except VlalError as error:
        sys.stderr.write(f"{program.name}: error: {error}\n")
        if not quiet:
            _write_result(program, config, flags, {"code": error.exit_code, "reason": str(error)})
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{program.name}: interrupted; repeat the command to continue\n")
        return Stopped.exit_code
    except BrokenPipeError:
        # The reader of our output (`| head`) has seen enough; Python must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk or a forbidden folder outside of any store, such as the temporary one.
        sys.stderr.write(f"{program.name}: error: {error}; check disk space and permissions\n")
        if not quiet:
            code = StorageError.exit_code
            _write_result(program, config, flags, {"code": code, "reason": str(error)})
        return StorageError.exit_code
    except Exception as error:
        logger.exception("%s: an error that should not happen; please report it", program.name)
        if not quiet:
            reason = f"{type(error).__name__}: {error}"
            _write_result(program, config, flags, {"code": 1, "reason": reason})
        return 1
    if quiet:
        return 0
    counts = {**counts, "seconds": round(time.monotonic() - started, 3)}
    summary = ", ".join(f"{key} {_short(value)}" for key, value in counts.items())
    sys.stdout.write(f"{program.name}: done: {summary}\n")
    if "plan" not in flags:  # a plan did nothing, and must not replace the record of what was done
        result = {"code": 0, "reason": "done", "counts": counts}
        _write_result(program, config, flags, result, config_text=config_yaml(config))
    return _write_counts(program, flags.get("json"), counts)


def _parse(program: Program, argv: Sequence[str]) -> CommandLine:
    return parse_command_line(
        argv,
        flags=program.flags,
        sections=program.sections,
        needs_config=program.needs_config,
    )


def _write_counts(program: Program, path: str | None, counts: Counts) -> int:
    """`--json FILE`; the exit code."""
    if path is None:
        return 0
    try:
        Path(path).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"{program.name}: done, but --json {path}: {error.strerror}\n")
        return StorageError.exit_code
    return 0


def _write_result(
    program: Program,
    config: Config,
    flags: Mapping[str, str],
    result: dict[str, object],
    *,
    config_text: str | None = None,
) -> None:
    """Leave `PROGRAM.result.json`, and the config of a success, beside the output, if it can be."""
    try:
        store = open_store(program.output(config, flags))
        text = json.dumps(result, indent=2) + "\n"
        store.replace(f"{program.name}.result.json", text.encode())
        if config_text is not None:
            store.replace(f"{program.name}.config.yaml", config_text.encode())
    except VlalError as error:
        logger.warning("%s: no result.json was written: %s", program.name, error)


def _write_end(program: Program, line: CommandLine, *, code: int, seconds: float) -> None:
    """Tell node_exporter's textfile collector how the program ended."""
    folder = line.config.observability.textfiles
    if folder is None:
        return
    try:
        root = open_store(program.output(line.config, line.flags)).url
    except VlalError as error:
        logger.warning("%s: Prometheus is not told how it ended: %s", program.name, error)
        return
    write_job_end(Path(folder), program=program.name, root=root, code=code, seconds=seconds)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(inner)}" for key, inner in value.items()) + ")"
    return str(value)
