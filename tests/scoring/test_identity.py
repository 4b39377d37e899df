"""The scorer digest changes with what a similarity depends on; settings are adopted."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from vlal_dist.config.sections import ScoringConfig
from vlal_dist.errors import ConfigError, ConflictError, DataError
from vlal_dist.scoring.identity import (
    ScorerIdentity,
    ScoreSettings,
    ScoringJob,
    settings_key,
    store_settings,
    stored_settings,
    warn_of_ignored,
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
JOB = ScoringJob(
    scoring=ScoringConfig(cpus_per_actor=1),
    dataset="",
    scores="here",
    cache="",
    identity=IDENTITY,
    device="cpu",
    temperature=0.01,
)


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
    assert stored_settings(store, JOB) is None
    assert store_settings(store, JOB, SETTINGS) == SETTINGS
    later = dataclasses.replace(SETTINGS, batch_size=8, threads=2)
    assert store_settings(store, JOB, later) == SETTINGS
    assert stored_settings(store, JOB) == SETTINGS
    with caplog.at_level(logging.WARNING):
        given = ScoringConfig(batch_size=8, cpus_per_actor=2)
        warn_of_ignored(SETTINGS, dataclasses.replace(JOB, scoring=given))
    assert caplog.messages == [
        "ignoring batch_size=8: here was created with batch_size=64",
        "ignoring threads=2: here was created with threads=1",
    ]
    other = dataclasses.replace(IDENTITY, weights_digest="e" * 64)
    assert store_settings(store, dataclasses.replace(JOB, identity=other), later) == later


def test_another_temperature_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store_settings(store, JOB, SETTINGS)
    hot = dataclasses.replace(JOB, temperature=0.5)
    with pytest.raises(ConflictError, match=r"0\.01, this run has 0\.5"):
        store_settings(store, hot, dataclasses.replace(SETTINGS, temperature=0.5))


def test_a_root_created_on_gpus_is_refused_on_the_cpu(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store_settings(store, JOB, dataclasses.replace(SETTINGS, device="cuda"))
    with pytest.raises(ConfigError, match="created on GPUs"):
        stored_settings(store, JOB)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.create(settings_key(IDENTITY.digest), b'{"batch_size": 1}')
    with pytest.raises(DataError, match="damaged"):
        stored_settings(store, JOB)
