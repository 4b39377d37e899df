"""What makes two scores the same score: the scorer's digest, and the settings shared by all runs.

The digest covers everything that changes the meaning of a similarity. The settings change only its
last bits (batch shape, threads, device): the first run under a scorer stores them before its first
output, and every later run adopts them, so that equal files stay equal.
"""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass

from vlal_dist.errors import ConfigError, ConflictError, DataError
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the scoring procedure (crop, similarity); part of the scorer digest."""


@dataclass(frozen=True)
class ScorerIdentity:
    """All that a similarity depends on, besides the crop.

    Attributes:
        model: open_clip model name.
        weights_digest: sha256 of the weights.
        preprocessing_digest: sha256 of the model's preprocessing settings.
        templates: prompt templates.
        feasible_digest: digest of the feasible sets.
        vocabulary_digest: digest of the names.
        precision: encoder arithmetic.
    """

    model: str
    weights_digest: str
    preprocessing_digest: str
    templates: tuple[str, ...]
    feasible_digest: str
    vocabulary_digest: str
    precision: str

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON. Temperature and batch size are not in it."""
        values = {**dataclasses.asdict(self), "format": FORMAT}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ScoreSettings:
    """How similarities are computed, shared by all runs of one scorer under one root.

    Attributes:
        batch_size: rows per encoder call.
        threads: torch threads per actor.
        precision: encoder arithmetic.
        device: cpu or cuda.
        temperature: tau of Eq. (2), written into score headers and `scores.json`.
    """

    batch_size: int
    threads: int
    precision: str
    device: str
    temperature: float


def settings_key(scorer_digest: str) -> str:
    """Storage key of the settings of one scorer."""
    return f"settings-{scorer_digest[:16]}.json"


def adopt_settings(store: Store, wanted: ScoreSettings, *, scorer_digest: str) -> ScoreSettings:
    """Store `wanted` if this is the first run of the scorer, else return what the first one stored.

    Raises:
        ConflictError: the first run used another temperature.
        ConfigError: the first run used a GPU and this one may not.
        DataError: the stored file is damaged.
    """
    key = settings_key(scorer_digest)
    text = json.dumps(dataclasses.asdict(wanted), indent=2, sort_keys=True) + "\n"
    try:
        store.create(key, text.encode())
        return wanted
    except ConflictError:
        pass
    try:
        stored = ScoreSettings(**json.loads(store.read(key)))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{store.url}/{key} is damaged ({error}); score into a new paths.scores"
        ) from None
    if stored.temperature != wanted.temperature:
        raise ConflictError(
            f"{store.url} was begun with temperature {stored.temperature}, this run has "
            f"{wanted.temperature}; keep one scoring.temperature per paths.scores"
        )
    if stored.device == "cuda" and wanted.device == "cpu":
        raise ConfigError(
            f"{store.url} was begun on GPUs and this run is on the CPU, whose last bits differ; "
            "go on with GPUs (scoring.device cuda), or score into a new paths.scores"
        )
    for name in ("batch_size", "threads", "device"):
        old, new = getattr(stored, name), getattr(wanted, name)
        if old != new:
            logger.warning(
                "%s %s was asked for; %s was begun with %s, which is adopted so that all score "
                "files are computed alike",
                name,
                new,
                store.url,
                old,
            )
    return stored
