"""The scorer digest changes with all that matters and nothing else; settings are adopted."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from vlal_dist.errors import ConfigError, ConflictError, DataError
from vlal_dist.scoring.identity import (
    ScorerIdentity,
    ScoreSettings,
    settings_key,
    store_settings,
    stored_settings,
    warn_of_other_settings,
)
from vlal_dist.storage.store import open_store

IDENTITY = ScorerIdentity(
    model="ViT-B-32",
    weights_digest="a" * 64,
    preprocessing_digest="b" * 64,
    templates=("a photo of {attribute} {object}",),
    feasible_digest="c" * 64,
    vocabulary_digest="d" * 64,
    precision="fp32",
)
SETTINGS = ScoreSettings(
    batch_size=64,
    threads=1,
    decode_threads=2,
    precision="fp32",
    device="cpu",
    compiled=False,
    temperature=0.01,
)
SCORER = IDENTITY.digest


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ScorerIdentity)])
def test_every_field_enters_the_digest(field: str) -> None:
    value: Any = ("{attribute}",) if field == "templates" else "other"
    assert dataclasses.replace(IDENTITY, **{field: value}).digest != IDENTITY.digest


def test_digest_is_the_sha256_of_canonical_json() -> None:
    """Files are named by it: it must not change by accident."""
    values = {
        "feasible_digest": "c" * 64,
        "format": 2,
        "model": "ViT-B-32",
        "precision": "fp32",
        "preprocessing_digest": "b" * 64,
        "templates": ["a photo of {attribute} {object}"],
        "vocabulary_digest": "d" * 64,
        "weights_digest": "a" * 64,
    }
    text = json.dumps(values).replace(", ", ",").replace(": ", ":")
    assert hashlib.sha256(text.encode()).hexdigest() == IDENTITY.digest


def test_order_of_templates_enters_the_digest() -> None:
    two = dataclasses.replace(IDENTITY, templates=("{attribute}", "{object} {attribute}"))
    swapped = dataclasses.replace(two, templates=two.templates[::-1])
    assert two.digest != swapped.digest


def test_prompts_and_feasible_sets_leave_the_embedder_alone() -> None:
    for field in (field.name for field in dataclasses.fields(ScorerIdentity)):
        other = dataclasses.replace(IDENTITY, **{field: ("x",) if field == "templates" else "x"})
        same = field in ("templates", "feasible_digest", "vocabulary_digest")
        assert (other.embedder_digest == IDENTITY.embedder_digest) == same, field


def test_the_first_run_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(str(tmp_path))
    asked = {"scorer_digest": SCORER, "temperature": 0.01, "device": "cpu"}
    assert stored_settings(store, **asked) is None
    assert store_settings(store, SETTINGS, scorer_digest=SCORER) == SETTINGS
    later = dataclasses.replace(SETTINGS, batch_size=8, threads=2)
    assert store_settings(store, later, scorer_digest=SCORER) == SETTINGS
    assert stored_settings(store, **asked) == SETTINGS
    with caplog.at_level(logging.WARNING):
        wanted = {"batch_size": 8, "threads": 2, "decode_threads": None, "device": "cpu"}
        warn_of_other_settings(SETTINGS, wanted, "here")
    text = caplog.text
    assert "batch_size 8" in text and "threads 2 was" in text
    assert "decode_threads" not in text and "device" not in text
    assert store_settings(store, later, scorer_digest="e" * 64) == later


def test_another_temperature_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store_settings(store, SETTINGS, scorer_digest=SCORER)
    with pytest.raises(ConflictError, match=r"0\.01, this run has 0\.5"):
        store_settings(store, dataclasses.replace(SETTINGS, temperature=0.5), scorer_digest=SCORER)


def test_begun_on_gpus_does_not_go_on_without(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store_settings(store, dataclasses.replace(SETTINGS, device="cuda"), scorer_digest=SCORER)
    with pytest.raises(ConfigError, match="begun on GPUs"):
        stored_settings(store, scorer_digest=SCORER, temperature=0.01, device="cpu")


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.create(settings_key(SCORER), b'{"batch_size": 1}')
    with pytest.raises(DataError, match="damaged"):
        stored_settings(store, scorer_digest=SCORER, temperature=0.01, device="cpu")
