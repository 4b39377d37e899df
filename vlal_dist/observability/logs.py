"""Log lines on standard error: time, rank if there are several, level, message."""

import logging
import os
import sys

QUIET = ("botocore", "boto3", "urllib3", "s3transfer", "PIL", "DeepSpeed", "matplotlib")


def setup_logging() -> None:
    """Send the root logger to standard error; other ranks than 0 show warnings only."""
    rank = int(os.environ.get("RANK", "0"))
    where = f" rank {rank}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s{where} %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
