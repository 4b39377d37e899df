"""Remarks: warnings of a program that are repeated at its end, recorded, and shown on the page.

A remark is for what changes the result and has a remedy: a step that drops a fifth of the data,
a CLIP at chance, a setting that names nothing. A warning in the middle of a thousand log lines is
missed, so `program.run_program` prints all remarks of a run once more before its closing line and
keeps them in `NAME.result.json`; `vlal run` and the report page gather those of all stages. What is
of the moment only, such as a request that is tried again, is a plain log line.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vlal_dist.errors import bounded

MOST = 20
"""Remarks that a run keeps; further ones are logged only."""
LONGEST = 600
"""Characters of the longest remark; of a longer one the middle is left out."""


@dataclass(frozen=True)
class Remark:
    """One remark.

    Attributes:
        key: what it is about, for programs: a setting, or a setting and a step.
        text: what was found, with its numbers, and what to do; one line.
    """

    key: str
    text: str


class _Kept:
    """Where the remarks of the running program go; None outside of `collected_remarks`."""

    remarks: list[Remark] | None = None


def remark(logger: logging.Logger, key: str, text: str, *args: object) -> None:
    """Log a warning now, and keep it for the end of the running program.

    Equal remarks are logged and kept once. Call it where the whole input is seen, on the driver
    and not in workers: what a rank other than 0 remarks is neither logged nor kept, so all ranks
    may call it with what they all know.

    Args:
        logger: of the calling module.
        key: see `Remark`.
        text, args: as of `Logger.warning`.
    """
    if (os.environ.get("RANK") or "0") != "0":
        return
    line = " ".join((text % args if args else text).split())
    one, kept = Remark(key, bounded(line, most=LONGEST)), _Kept.remarks
    if kept is not None:
        if one in kept:
            return
        if len(kept) < MOST:
            kept.append(one)
    logger.warning("%s", one.text, stacklevel=2)


@contextmanager
def collected_remarks() -> Iterator[list[Remark]]:
    """Context that keeps the remarks made in it, on any thread, in the list that it gives."""
    before, kept = _Kept.remarks, list[Remark]()
    _Kept.remarks = kept
    try:
        yield kept
    finally:
        _Kept.remarks = before
