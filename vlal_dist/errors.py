"""Errors that users see, each with its exit code (docs/command-line.md).

    VlalError            1   any other error of this project
    +- UsageError        2   unknown flag, wrong number of arguments
    +- ConfigError      64   unknown key, value out of range, absent weights or settings
    +- DataError        65   bad input, digests that differ, altered or truncated shards
    |  +- ConflictError 65   a create-only name already holds other bytes
    |  +- TruncatedError 65  a file or object ends before a range that its index states
    |  +- ReplacedError 65   an object was replaced while it was in use
    +- StorageError     74   bucket, credentials, network, disk
    |  +- NotFoundError 74   the file or object is not there
    +- Stopped          75   stopped by a signal; the same command resumes

Every message names what was given, what is allowed, and what to do.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 4000
"""Characters of the longest message; of a longer one the middle is left out."""


def bounded(text: str, *, most: int = 200) -> str:
    """The text, or its beginning and end, where the remedy stands, in at most `most` characters."""
    if len(text) <= most:
        return text
    gap = f" ... {len(text) - most} characters ... "
    end = (most - len(gap)) // 4
    return f"{text[: most - len(gap) - end]}{gap}{text[len(text) - end :]}"


class VlalError(Exception):
    """Base of all errors raised on purpose by this project."""

    exit_code = 1

    def __str__(self) -> str:
        """The message; it may quote a file or a setting, so its length is bounded."""
        return bounded(super().__str__(), most=LONGEST)


class UsageError(VlalError):
    """The command line itself is wrong."""

    exit_code = 2


class ConfigError(VlalError, ValueError):
    """A setting is unknown, out of range, or names something that is absent."""

    exit_code = 64


class DataError(VlalError, ValueError):
    """Input data, a digest or a stored file is not what it must be."""

    exit_code = 65


class ConflictError(DataError):
    """A create-only commit found other bytes under the same name."""


class TruncatedError(DataError):
    """A file or object ends before the requested range; reading again does not help."""


class ReplacedError(DataError):
    """Stored data, which must not be edited, was replaced while this process was using it."""


class StorageError(VlalError, OSError):
    """A store cannot be reached, read or written."""

    exit_code = 74


class NotFoundError(StorageError):
    """The named file or object does not exist."""


class Stopped(VlalError):
    """The run got a stop signal, has saved its state, and can be resumed."""

    exit_code = 75


EXTRAS = {
    "deepspeed": "train",
    "tensorboard": "train",
    "ray": "score",
    "open_clip": "score",
    "transformers": "hf",
    "boto3": "s3",
    "botocore": "s3",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "mlflow": "trackers",
    "wandb": "trackers",
}
"""Module -> the extra of the package that installs it (pyproject.toml)."""


def require_modules(*names: str) -> None:
    """Raise a ConfigError that names the extra of the first module that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise _not_installed(name)


@contextmanager
def extras_named() -> Iterator[None]:
    """Context in which the absence of an extra's module is a ConfigError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        raise _not_installed(module) from None


def _not_installed(module: str) -> ConfigError:
    return ConfigError(f"{module} is not installed; run: pip install 'vlal-dist[{EXTRAS[module]}]'")
