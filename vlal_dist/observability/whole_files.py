"""Small local files that others watch: complete at once, or not at all."""

import contextlib
import hashlib
import os
import re
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a half of it.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    # Another ending: Prometheus and node_exporter look at *.json and *.prom.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def slug(root: str) -> str:
    """A name for files: readable, and different for different roots."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", root).strip("-")[-60:]
    return f"{readable}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
