"""The offline tools: `python -m shard_tools import|clean|pack|merge|reshard|verify|inspect`."""

import sys
from collections.abc import Sequence

from vlal_dist.program import COMMANDS, run_command, run_one_of

TOOLS = ("import", "clean", "pack", "merge", "reshard", "verify", "inspect")


def main(argv: Sequence[str]) -> int:
    """Run one tool and return its exit code (docs/command-line.md).

    Args:
        argv: command line without the program's name; its first word names the tool.
    """
    return run_one_of(
        {tool: COMMANDS[tool][1] for tool in TOOLS},
        run_command,
        argv,
        command="python -m shard_tools",
        kind="tool",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
