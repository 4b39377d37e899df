"""Runner of every program: command line, logging, closing line, result files, exit code.

A program is a function `(Config, flags) -> counts`. `run_program` turns its errors into one line
and an exit code (docs/command-line.md), prints the closing line, writes `result.json`, and the
outcome for Prometheus if `observability.textfiles` is set.
"""

import contextlib
import difflib
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlal_dist import __version__
from vlal_dist.config.load import (
    EXIT_CODES,
    SHARED_FLAGS,
    CommandLine,
    config_yaml,
    help_text,
    parse_command_line,
)
from vlal_dist.config.sections import Config
from vlal_dist.errors import (
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
    Stopped,
    StorageError,
    UsageError,
    VlalError,
    extras_named,
)
from vlal_dist.observability.logs import lasting_streams, setup_logging
from vlal_dist.observability.prometheus_files import write_job_end
from vlal_dist.pipeline import Flags, Inputs
from vlal_dist.remarks import Remark, collected_remarks
from vlal_dist.storage.checks import masked, remedy
from vlal_dist.storage.earlier import Owned, forget_replacing, remove_earlier
from vlal_dist.storage.lock import writer_lock
from vlal_dist.storage.store import open_store

EXIT_FILE = "VLAL_EXIT_FILE"
"""Environment variable: file in which a program leaves its exit code for `supervise`."""

COMMANDS: dict[str, tuple[str, str]] = {
    "import": (
        "shard_tools.importers.program",
        "tables and other formats -> annotation files, and a configuration",
    ),
    "clean": (
        "shard_tools.clean.program",
        "annotation files -> instances, vocabulary, feasible sets",
    ),
    "pack": ("shard_tools.pack", "instances and photos -> WebDataset shards, index, manifest"),
    "score": ("vlal_dist.score_clip", "CLIP similarity of each crop to its feasible attributes"),
    "merge": ("shard_tools.merge", "shards and score files -> shards that hold likelihoods"),
    "train": ("vlal_dist.train", "train the classifier, on one rank or many; repeat to resume"),
    "evaluate": ("vlal_dist.evaluate", "score a split: mAP, and figures of each attribute"),
    "report": ("vlal_dist.report", "one HTML page about a run"),
    "export": ("vlal_dist.export", "the best model as a folder that loads without the dataset"),
    "predict": ("vlal_dist.predict", "attributes of objects in photos, by an exported model"),
    "experiments": ("vlal_dist.experiments", "the paper's tables over several seeds"),
    "verify": ("shard_tools.verify", "check every byte of a dataset against its manifest"),
    "inspect": ("shard_tools.inspect_dataset", "show what a dataset root holds"),
    "reshard": ("shard_tools.reshard", "the same samples in shards and blocks of other sizes"),
    "supervise": ("vlal_dist.supervise", "run a command, and restart it when it fails"),
    "demo": ("vlal_dist.demo.__main__", "the whole pipeline on rendered photos, in minutes"),
    "run": ("vlal_dist.run", "all stages of a configuration, each unless it is up to date"),
}
"""Command -> its module, which has a `main(argv)` or a `PROGRAM`, and its purpose."""

NO_CONFIG = (
    "; neither --config FILE nor VLAL_CONFIG was given, so all settings and roots are the defaults"
)
"""Added to errors of a command that names no configuration and no root."""

REPLACE = "; or repeat the command with --replace: what {name} wrote there is removed first"
"""Added to errors of a program whose root holds other output."""

Counts = dict[str, object]
Work = Callable[[Config, Flags], Counts]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """Command line, sections and work of one program.

    Attributes:
        name: short name, first word of the closing line.
        usage: the command as users type it.
        purpose: one paragraph for `--help`.
        sections: config sections it reads.
        output: the root it writes, where `result.json` and the config go.
        work: the work itself; returns the closing counts.
        flags: flags without a dot that it accepts.
        inputs: what decides its output, recorded with the result, so that `vlal run` knows whether
            it holds (pipeline.py); None: no stage of `vlal run`.
        record: folder below `output` in which the result is written as well, where one root holds
            the results of several commands.
        owned: what it writes in `output`, for a program with the flag `replace`, whose work calls
            `make_way` before its first write.
        shown: counts of the closing line, in order, `a.b` for one within another; empty: all.
        writes: what one process at a time may write: roots, each with a name where its results have
            a place of their own in the root (`writer_lock`); None: `record` in `output`, else
            `output` as a whole; empty: the program only reads.
    """

    name: str
    usage: str
    purpose: str
    sections: tuple[str, ...]
    output: Callable[[Config, Flags], str]
    work: Work
    flags: tuple[str, ...] = ("json",)
    inputs: Callable[[Config, Flags], Inputs] | None = None
    record: Callable[[Config], str] | None = None
    owned: Owned | None = None
    shown: tuple[str, ...] = ()
    writes: Callable[[Config, Flags], Sequence[tuple[str, str]]] | None = None


def only_reads(config: Config, flags: Flags) -> Sequence[tuple[str, str]]:
    """`Program.writes` of a program that writes nothing but its result."""
    return ()


def make_way(program: Program, config: Config, flags: Flags) -> bool:
    """With `--replace`, remove what the program wrote in its root before; whether it was asked for.

    Called by the work when all that can be wrong with its input has been checked.

    Raises:
        DataError, StorageError: as `remove_earlier`.
    """
    if "replace" not in flags or program.owned is None:
        return False
    inputs = None if program.inputs is None else program.inputs(config, flags)
    store = open_store(program.output(config, flags))
    remove_earlier(store, program.owned, program=program.name, inputs=inputs)
    return True


def run_program(program: Program, argv: Sequence[str], *, quiet: bool = False) -> int:
    """Run one program and return its exit code.

    Args:
        program: what to run.
        argv: command line without the program's name.
        quiet: no closing line and no result files (ranks other than 0).
    """
    with lasting_streams(output=program.writes is not only_reads), collected_remarks() as remarks:
        code = _run(program, argv, remarks, quiet=quiet)
    exit_file = os.environ.get(EXIT_FILE)
    if exit_file and not quiet:
        # Launchers change exit codes. Without this file the supervisor uses theirs.
        with contextlib.suppress(OSError):
            Path(exit_file).write_text(str(code), encoding="ascii")
    return code


def run_one_of(
    purposes: Mapping[str, str],
    run: Callable[[str, Sequence[str]], int],
    argv: Sequence[str],
    *,
    command: str,
    kind: str,
) -> int:
    """Run what the first word names, and return its exit code.

    Args:
        purposes: word -> what it does, for `--help`.
        run: runs a word with the arguments behind it.
        argv: command line without `command`.
        command: what users type before the word, such as `python -m shard_tools`.
        kind: what the words name, such as `tool`.
    """
    width = 2 + max(map(len, purposes))
    lines = [f"usage: {command} {kind.upper()} [--config FILE] [--section.key value ...]", ""]
    lines += [f"  {word:<{width}}{purpose}" for word, purpose in purposes.items()]
    lines += ["", *SHARED_FLAGS, "", *EXIT_CODES, ""]
    lines += [f"{command} {kind.upper()} --help lists the settings and flags of a {kind}", ""]
    word = argv[0] if argv else "--help"
    if word in ("--help", "-h"):
        (sys.stdout if argv else sys.stderr).write("\n".join(lines))
        return 0 if argv else UsageError.exit_code
    if word == "--version":
        sys.stdout.write(f"{command.split()[-1]} {__version__}\n")
        return 0
    if word not in purposes:
        near = difflib.get_close_matches(word, purposes, n=1, cutoff=0.0)[0]
        sys.stderr.write(
            f"{command.split()[-1]}: error: unknown {kind} {word!r}; the nearest is {near}; "
            f"{command} --help lists all\n"
        )
        return UsageError.exit_code
    return run(word, argv[1:])


def run_command(command: str, argv: Sequence[str]) -> int:
    """Import the module of a command of `COMMANDS`, run it, and return its exit code."""
    module = importlib.import_module(COMMANDS[command][0])
    if hasattr(module, "main"):
        return int(module.main(argv))
    return run_program(module.PROGRAM, argv)


def _run(program: Program, argv: Sequence[str], remarks: Sequence[Remark], *, quiet: bool) -> int:
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
        line = parse_command_line(argv, flags=program.flags, sections=program.sections)
    except (VlalError, OSError) as error:
        sys.stderr.write(masked(f"{program.name}: error: {error}\n"))
        return error.exit_code if isinstance(error, VlalError) else StorageError.exit_code
    if quiet or "plan" in line.flags:  # a plan did nothing, and must not replace the last result
        code, result = _work(program, line)
        if quiet:
            return code
        return _close(program, line, result, remarks, code=code, started=started)
    with contextlib.ExitStack() as locks:
        try:
            for root, name in locked_places(program, line):
                locks.enter_context(writer_lock(root, name, program=program.name))
        except KeyboardInterrupt:
            sys.stderr.write(f"{program.name}: interrupted; repeat the command to continue\n")
            return Stopped.exit_code
        except VlalError as error:  # another's root, whose result must stay
            sys.stderr.write(f"{program.name}: error: {masked(str(error))}\n")
            return error.exit_code
        inputs = _begin_record(program, line)
        code, result = _work(program, line)
        if result is not None and code == 0 and inputs is not None:
            result["inputs"] = inputs
        return _close(program, line, result, remarks, code=code, started=started)


def locked_places(program: Program, line: CommandLine) -> Sequence[tuple[str, str]]:
    """What the program locks; see `Program.writes`."""
    if program.writes is not None:
        return program.writes(line.config, line.flags)
    name = "" if program.record is None else program.record(line.config)
    return ((program.output(line.config, line.flags), name),)


def _close(
    program: Program,
    line: CommandLine,
    result: dict[str, Any] | None,
    remarks: Sequence[Remark],
    *,
    code: int,
    started: float,
) -> int:
    """Write the results, then the remarks and the closing line, which may have no reader.

    Returns:
        The exit code.
    """
    seconds, counts = time.monotonic() - started, None
    warnings = [{"key": one.key, "text": masked(one.text)} for one in remarks]
    if result is not None:
        result["warnings"] = warnings
    if result is not None and code == 0:
        counts = {**result["counts"], "seconds": round(seconds, 3)}
        result["counts"] = counts
        if (path := line.flags.get("json")) is not None:
            code = _write_counts(program, path, {**counts, "warnings": warnings})
    if "plan" not in line.flags:
        _write_result(program, line, result, code=code, seconds=seconds)
    if counts is not None:
        for one in warnings:
            sys.stdout.write(f"{program.name}: warning: {one['text']}\n")
        sys.stdout.write(closing_line(program, counts) + "\n")
    return code


def _begin_record(program: Program, line: CommandLine) -> Inputs | None:
    """The inputs before the work; removes the last result, which a killed work would belie."""
    if program.inputs is None:
        return None
    try:
        inputs = program.inputs(line.config, line.flags)
        store = open_store(program.output(line.config, line.flags))
        store.delete(_records(program, line.config)[-1])
    except (VlalError, OSError):  # the work reports it
        return None
    return inputs


def _records(program: Program, config: Config) -> list[str]:
    """Keys of the result; the last one is the record of this very command."""
    name = f"{program.name}.result.json"
    return [name] if program.record is None else [name, f"{program.record(config)}/{name}"]


def _work(program: Program, line: CommandLine) -> tuple[int, dict[str, Any] | None]:
    """Run the program's work; its exit code and, unless it was cut off, its `result.json`."""
    try:
        with extras_named():
            counts = program.work(line.config, line.flags)
        if program.writes is only_reads:
            sys.stdout.flush()  # its output is its result
        return 0, {"code": 0, "reason": "done", "counts": counts}
    except VlalError as error:
        code, reason = error.exit_code, masked(str(error))
        if isinstance(error, ConflictError) and program.owned is not None:
            reason += REPLACE.format(name=program.name)
        if line.unaimed and isinstance(error, ConfigError | DataError | NotFoundError):
            reason += NO_CONFIG
        sys.stderr.write(f"{program.name}: error: {reason}\n")
    except KeyboardInterrupt:
        sys.stderr.write(f"{program.name}: interrupted; repeat the command to continue\n")
        return Stopped.exit_code, None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and program.writes is only_reads:
            return 0, None  # the reader of what it prints (`| head`) has seen enough
        # A full disk or a forbidden folder outside of any store, such as the temporary one.
        code, reason = StorageError.exit_code, masked(str(error))
        advice = remedy(error)
        sys.stderr.write(f"{program.name}: error: {reason}{advice and '; '}{advice}\n")
    except Exception as error:
        logger.exception("%s: unexpected error; please report it", program.name)
        code, reason = 1, masked(f"{type(error).__name__}: {error}")
    return code, {"code": code, "reason": reason}


def _write_counts(program: Program, path: str, counts: Counts) -> int:
    """`--json FILE`; the exit code."""
    try:
        Path(path).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"{program.name}: done, but --json {path}: {error.strerror}\n")
        return StorageError.exit_code
    return 0


def _write_result(
    program: Program,
    line: CommandLine,
    result: Mapping[str, object] | None,
    *,
    code: int,
    seconds: float,
) -> None:
    """Write `NAME.result.json`, the config of a success, and the outcome for node_exporter."""
    try:
        store = open_store(program.output(line.config, line.flags))
    except VlalError as error:
        logger.warning("%s: no result.json was written: %s", program.name, error)
        return
    try:
        if result is not None:
            text = json.dumps(result, indent=2) + "\n"
            for key in _records(program, line.config):
                store.replace(key, text.encode())
            if result["code"] == 0:
                if program.owned is not None:
                    forget_replacing(store, program=program.name)
                store.replace(f"{program.name}.config.yaml", config_yaml(line.config).encode())
    except VlalError as error:
        logger.warning("%s: no result.json was written: %s", program.name, error)
    if (folder := line.config.observability.textfiles) is not None:
        write_job_end(
            Path(folder), program=program.name, root=store.url, code=code, seconds=seconds
        )


CLOSING = 200
"""Characters of the longest closing line."""


def closing_line(program: Program, counts: Counts) -> str:
    """What a person reads at the end: `NAME: done: ...`, of at most `CLOSING` characters.

    Counts that have no room are left out: all of them stand in `NAME.result.json` and `--json`.
    """
    flat = {**counts}
    for key, value in counts.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
    names = [name for name in program.shown if name in flat] or [*counts]
    seconds = f"seconds {_short(counts['seconds'])}"
    line = f"{program.name}: done:"
    for name in names:
        item = f" {name.replace('.', ' ')} {_short(flat[name])},"
        if name != "seconds" and len(line) + len(item) + len(seconds) < CLOSING:
            line += item
    return f"{line} {seconds}"


def _short(value: object) -> str:
    """A count as the closing line shows it: measured values with five significant figures."""
    if value is None:
        return "undefined"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, Mapping):
        shown = {k: len(v) if isinstance(v, Mapping) else v for k, v in value.items()}
        return "(" + ", ".join(f"{key} {_short(inner)}" for key, inner in shown.items()) + ")"
    return str(value)
