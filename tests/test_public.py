"""The public names: imported on first use, described, and their examples run."""

import doctest
import importlib
import subprocess
import sys

import pytest

import vlal_dist as vlal

MODULES = (
    "vlal_dist.losses",
    "vlal_dist.method.clip_likelihood",
    "vlal_dist.method.feasible",
    "vlal_dist.method.metrics",
)
"""Modules whose examples are run."""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, vlal_dist; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = python(code)
    for library in ("torch", "numpy", "pydantic", "yaml", "ray"):
        assert f"'{library}'" not in loaded
    assert "'vlal_dist'" in loaded


def test_every_name_is_there_and_listed() -> None:
    assert vlal.__version__ == "0.4.0"
    for name in vlal.__all__:
        assert getattr(vlal, name) is getattr(vlal, name)
        assert name in dir(vlal)


def test_a_star_import_brings_them() -> None:
    names: dict[str, object] = {}
    exec("from vlal_dist import *", names)
    assert set(vlal.__all__) <= set(names)
    assert names["evaluate"] is vlal.evaluate


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'vlal_dist' has no attribute 'SelectiveLos'"):
        vlal.SelectiveLos  # noqa: B018


def test_evaluate_stays_the_function_beside_the_program() -> None:
    code = """
import importlib, sys, vlal_dist
program = importlib.import_module("vlal_dist.evaluate")
import vlal_dist.evaluate
from vlal_dist.evaluate import PROGRAM
from vlal_dist import evaluate
assert vlal_dist.evaluate is evaluate and evaluate.__module__ == "vlal_dist.method.metrics"
assert program.PROGRAM is PROGRAM and sys.modules["vlal_dist.evaluate"] is program
print("same")
"""
    assert python(code) == "same\n"


@pytest.mark.parametrize("name", [name for name in vlal.__all__ if name != "__version__"])
def test_every_name_has_a_description(name: str) -> None:
    first = (getattr(vlal, name).__doc__ or "").strip().splitlines()
    assert first and first[0].endswith(".")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 1 and found.failed == 0
