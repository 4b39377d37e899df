"""torchrun's launcher for `vlal train --ranks N`, quiet where the ranks have said what is wrong.

    python -m vlal_dist.training.launch --standalone --nproc_per_node N -m MODULE ARGUMENTS

torchrun itself ends the one line of a rank that failed with a page of its own traceback.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str]) -> int:
    """Run the ranks on torchrun's arguments; returns the exit code of the first that failed."""
    logging.disable(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a banner
    try:
        run.run(run.parse_args(list(argv)))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # which torchrun sends
                sys.stderr.write(f"train: rank {rank} was killed by {failure.signal_name()}\n")
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
