"""Whether the launcher of this rank is still there.

SIGTERM to the `deepspeed` command ends that command alone: its child, which started the ranks, and
the ranks go on, with nobody to wait for them. So a rank looks at both between its steps.
"""

import os
from collections.abc import Sequence

from vlal_dist.processes import Process, command_line, look_at, names

PROGRAM_WORDS = 4
"""`python -u -m MODULE`: where a command line names its program; later words are arguments."""
INIT = 1
NOBODY = Process(pid=-1, parent=-1, started=-1)


class Launcher:
    """The processes that started this rank and that it must not outlive.

    Args:
        watched: none: nothing is ever missed.
    """

    def __init__(self, watched: Sequence[Process]) -> None:
        self._watched = tuple(watched)

    @classmethod
    def of_this_process(cls) -> "Launcher":
        """DeepSpeed's two, torchrun's one; none for a process that a shell started.

        What started a launcher (a shell, ssh, a scheduler) may end and leave it to its work.
        """
        parent = look_at(os.getppid())
        if parent is None:
            return cls(())
        words = command_line(parent.pid)[:PROGRAM_WORDS]
        if "torchrun" in names(words) or "torch.distributed.run" in words:
            return cls((parent,))
        if "deepspeed.launcher.launch" not in words:
            return cls(())
        front = look_at(parent.parent)
        if front is not None and "deepspeed" in names(command_line(front.pid)[:PROGRAM_WORDS]):
            return cls((parent, front))
        if parent.parent == INIT and os.environ.get("CROSS_SIZE") == "1":
            # On a single machine the front process starts the other: here it is gone already.
            return cls((parent, NOBODY))
        return cls((parent,))

    def is_gone(self) -> bool:
        """Whether one of them has ended."""
        return not all(process.is_alive() for process in self._watched)
