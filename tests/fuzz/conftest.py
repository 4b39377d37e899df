"""Fixture `times`: the budget of a fuzz test, once in the default suite, more by marker."""

import pytest

from tests.fuzz.mutations import NIGHTLY, SLOW


@pytest.fixture(
    params=[
        1,
        pytest.param(SLOW, marks=pytest.mark.slow),
        pytest.param(NIGHTLY, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)]),
    ],
    ids=["few", "more", "many"],
)
def times(request: pytest.FixtureRequest) -> int:
    """How many times the default number of examples is run."""
    return int(request.param)
