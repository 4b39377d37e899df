"""Fixtures of the small evaluated dataset, shared with `tests/evaluation`."""

from tests.evaluation.conftest import dataset, dataset_root, truth_file

__all__ = ["dataset", "dataset_root", "truth_file"]
