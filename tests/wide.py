"""Wide matrices: a few cases in the default run, the rest with the `long` tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def some_of(values: Iterable[Any], *kept: int) -> list[Any]:
    """Parameters of a test, of which those at the places `kept` run by default."""
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=_LONG * (n not in kept))
        for n, one in enumerate(values)
    ]


_LONG = [pytest.mark.long]
