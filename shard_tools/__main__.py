"""The offline tools: `python -m shard_tools clean|pack|merge|reshard|verify|inspect`."""

import importlib
import sys
from collections.abc import Sequence

from vlal_dist.errors import UsageError
from vlal_dist.program import Program, run_program

COMMANDS: dict[str, tuple[str, str]] = {
    "clean": (
        "shard_tools.clean.program",
        "annotation files -> instances, vocabulary, feasible sets",
    ),
    "pack": ("shard_tools.pack", "instances and photos -> WebDataset shards, index, manifest"),
    "merge": ("shard_tools.merge", "shards and score files -> shards that hold likelihoods"),
    "reshard": ("shard_tools.reshard", "the same samples in shards and blocks of other sizes"),
    "verify": ("shard_tools.verify", "check every byte of a dataset against its manifest"),
    "inspect": ("shard_tools.inspect_dataset", "show what a dataset root holds"),
}
"""Command -> module with a `PROGRAM`, and its purpose. Only that module is imported."""


def main(argv: Sequence[str]) -> int:
    """Run one tool and return its exit code (docs/command-line.md).

    Args:
        argv: command line without the program's name; its first word names the tool.
    """
    if argv and argv[0] in ("--help", "-h"):
        sys.stdout.write(usage_text())
        return 0
    if not argv or argv[0] not in COMMANDS:
        given = f"unknown tool {argv[0]!r}" if argv else "no tool given"
        sys.stderr.write(f"shard_tools: error: {given}\n{usage_text()}")
        return UsageError.exit_code
    program = importlib.import_module(COMMANDS[argv[0]][0]).PROGRAM
    assert isinstance(program, Program)
    return run_program(program, argv[1:])


def usage_text() -> str:
    """The tools and how to get help on each."""
    lines = ["usage: python -m shard_tools TOOL [--config FILE] [--section.key value ...]", ""]
    lines += [f"  {name:<8} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    lines += ["", "python -m shard_tools TOOL --help lists the settings of a tool"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
