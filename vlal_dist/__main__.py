"""The command `vlal`, also `python -m vlal_dist`: every program by its name.

The module of a command is imported when it runs, so that `vlal --help` is instant.
"""

import sys
from collections.abc import Sequence

from vlal_dist.program import COMMANDS, run_command, run_one_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (docs/command-line.md).

    Args:
        argv: command line without `vlal`; absent: this process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    purposes = {name: purpose for name, (_, purpose) in COMMANDS.items()}
    return run_one_of(purposes, run_command, argv, command="vlal", kind="command")


if __name__ == "__main__":
    sys.exit(main())
