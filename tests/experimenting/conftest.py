"""The small dataset of the training tests."""

from tests.training.conftest import small

__all__ = ["small"]
