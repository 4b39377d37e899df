"""Mutations of files: bytes, JSON, numbers in Arrow columns; and the law that readers obey.

A mutation is a small tuple of integers and choices that hypothesis draws and shrinks; what it does
to a file is a pure function, so that a failure is repeated by its example alone.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlal_dist.errors import LONGEST, VlalError

SECONDS = 30
"""Time of one example, after which it counts as hanging (on a busy machine, too)."""

NUMBERS = (0, 1, -1, 2, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1,
           2**63, 2**64 - 1, 10**12, 10**30)  # fmt: skip
DEEP = "\0deep"
"""Stands for a hundred thousand brackets: more than any parser's stack holds."""
VALUES: tuple[Any, ...] = (
    *NUMBERS, *(-one for one in NUMBERS[3:]), 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), float("-inf"), None, True, False, "", "x", "0", "nan", "a" * 100_000, "../../x",
    "/etc/passwd", "\0", "\ud800", "\N{RIGHT-TO-LEFT OVERRIDE}", "0" * 64, "f" * 16, [], {}, [[]],
    [None], {"": None}, [0] * 1000, DEEP,
)  # fmt: skip

ByteOps = list[tuple[str, int, int]]
TreeOps = list[tuple[str, int, int]]

_large = st.integers(0, 2**32 - 1)
_BYTES = (
    "flip",
    "flip",
    "flip",
    "set",
    "word",
    "word",
    "cut",
    "delete",
    "insert",
    "double",
    "swap",
)
_TREE = ("put", "put", "put", "drop", "rename", "swap", "wrap", "double", "longer")

byte_ops = st.lists(st.tuples(st.sampled_from(_BYTES), _large, _large), min_size=1, max_size=3)
"""Changes of a file's bytes; see `mutate_bytes`."""
tree_ops = st.lists(st.tuples(st.sampled_from(_TREE), _large, _large), min_size=1, max_size=2)
"""Changes of a JSON tree; see `mutate_json`."""
numbers = st.sampled_from(NUMBERS)


def mutate_bytes(data: bytes, ops: ByteOps) -> bytes:
    """The bytes with bits flipped, integers replaced, pieces cut, removed, doubled or swapped."""
    for kind, first, second in ops:
        at = first % (len(data) + 1)
        size = 1 + second % 64
        head, tail = data[:at], data[at:]
        if kind == "flip" and tail:
            data = head + bytes([tail[0] ^ 1 << second % 8]) + tail[1:]
        elif kind == "set" and tail:
            data = head + bytes([second % 256]) + tail[1:]
        elif kind == "word":
            width = (1, 2, 4, 8)[second % 4]
            number = NUMBERS[second // 4 % len(NUMBERS)] % 256**width
            data = head + number.to_bytes(width, "little") + tail[width:]
        elif kind == "cut":
            data = head
        elif kind == "delete":
            data = head + tail[size:]
        elif kind == "insert":
            data = head + second.to_bytes(4, "little") * (size // 4 + 1) + tail
        elif kind == "double":
            data = head + tail[:size] + tail
        elif kind == "swap":
            data = tail + head
    return data


def mutate_json(data: bytes, ops: TreeOps) -> bytes:
    """The JSON with values replaced, removed, renamed, exchanged, nested or doubled."""
    tree = [json.loads(data)]
    for kind, first, second in ops:
        places = list(_places(tree))
        holder, key = places[first % len(places)]
        value = holder[key]
        if kind == "put":
            holder[key] = deepcopy(VALUES[second % len(VALUES)])
        elif kind == "drop" and holder is not tree:
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[(key + "s", key[:-1], "", key.upper())[second % 4]] = holder.pop(key)
        elif kind == "swap":
            other, name = places[second % len(places)]
            holder[key], other[name] = deepcopy(other[name]), deepcopy(value)
        elif kind == "wrap":
            holder[key] = [value] if second % 2 else {"x": value}
        elif kind == "double" and isinstance(holder, list) and holder is not tree:
            holder.insert(key, deepcopy(value))
        elif kind == "longer" and isinstance(value, list):
            holder[key] = [*value, deepcopy(VALUES[second % len(VALUES)])]
    text = json.dumps(tree[0]) if tree else ""
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    stack = [tree]
    while stack:
        one = stack.pop()
        for key in range(len(one)) if isinstance(one, list) else list(one):
            yield one, key
            if isinstance(one[key], dict | list):
                stack.append(one[key])


def obeys(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None where it ends in an error that names what is wrong.

    Any other exception, one without an exit code of its own, an endless read and an endless
    message fail the test.
    """
    with _time_limit():
        try:
            return read()
        except VlalError as error:
            assert error.exit_code in (2, 64, 65, 74), repr(error)
            assert len(str(error)) <= LONGEST
            str(error).encode(errors="backslashreplace")
            return None


@contextmanager
def _time_limit() -> Iterator[None]:
    def expired(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"an example took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, expired)
    left = signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(left)
        signal.signal(signal.SIGALRM, before)


COUNTS: dict[str, int] = {}
"""Target -> examples that were run, for the summary of VLAL_FUZZ_COUNTS=1."""


def explore(
    target: str,
    check: Callable[..., None],
    *drawn: st.SearchStrategy[Any],
    examples: int,
    times: int,
) -> None:
    """Run `check` on that many drawn examples; the same ones each time, but for `nightly`.

    Args:
        target: name, for the counts.
        check: the test of one example.
        drawn: strategies of its arguments.
        examples: of the default suite.
        times: how many times as many are run.
    """

    @settings(
        max_examples=examples * times,
        derandomize=times < NIGHTLY,
        deadline=None,  # `obeys` has a limit of its own, which a busy machine does not reach
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*drawn))
    def run(values: tuple[Any, ...]) -> None:
        COUNTS[target] = COUNTS.get(target, 0) + 1
        check(*values)

    run()
    if os.environ.get("VLAL_FUZZ_COUNTS"):
        print(f"{target}: {COUNTS[target]} examples")


SLOW, NIGHTLY = 3, 60
"""Times as many examples as the default suite runs."""


def pick(names: Sequence[str]) -> st.SearchStrategy[str]:
    """One of some names."""
    return st.sampled_from(sorted(names))
