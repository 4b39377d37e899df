"""Fixtures of the small packed dataset and the tiny CLIP model, shared with `tests/scoring`."""

from tests.scoring.conftest import _offline, dataset, environment, fashion, many_shards, tiny

__all__ = ["_offline", "dataset", "environment", "fashion", "many_shards", "tiny"]
