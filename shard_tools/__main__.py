"""The offline tools: `python -m shard_tools clean|pack|merge|reshard|verify|inspect`."""

import importlib
import sys
from collections.abc import Sequence

from vlal_dist.program import run_one_of

TOOLS: dict[str, tuple[str, str]] = {
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
"""Tool -> module with a `PROGRAM`, and its purpose. Only that module is imported."""


def main(argv: Sequence[str]) -> int:
    """Run one tool and return its exit code (docs/command-line.md).

    Args:
        argv: command line without the program's name; its first word names the tool.
    """
    return run_one_of(
        {tool: purpose for tool, (_, purpose) in TOOLS.items()},
        lambda tool: importlib.import_module(TOOLS[tool][0]).PROGRAM,
        argv,
        module="shard_tools",
        kind="tool",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
