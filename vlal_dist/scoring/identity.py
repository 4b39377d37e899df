"""What makes two scores the same score: the scorer's digest, and the settings shared by all runs.

The digest covers everything that changes the meaning of a similarity. The settings change only its
last bits (batch shape, threads, device): the first run under a scorer stores them before its first
output, and every later run adopts them, so that equal files stay equal.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from vlal_dist.errors import ConfigError, ConflictError, DataError, NotFoundError
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)

FORMAT = 2
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
        return _digest(dataclasses.asdict(self))

    @property
    def embedder_digest(self) -> str:
        """sha256 (hex) of what an embedding depends on: prompts and feasible sets are not in it."""
        names = ("model", "weights_digest", "preprocessing_digest", "precision")
        return _digest({name: getattr(self, name) for name in names})


def _digest(values: Mapping[str, object]) -> str:
    text = json.dumps(
        {**values, "format": FORMAT}, sort_keys=True, separators=(",", ":"), ensure_ascii=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ScoreSettings:
    """How similarities are computed, shared by all runs of one scorer under one root.

    Attributes:
        batch_size: rows per encoder call.
        threads: torch threads per actor.
        decode_threads: decoding threads per actor.
        precision: encoder arithmetic.
        device: cpu or cuda.
        compiled: whether the encoders run through torch.compile.
        temperature: tau of Eq. (2), written into score headers and `scores.json`.
        images_per_s: what the warm-up foretold of one actor; None where none was made.
    """

    batch_size: int
    threads: int
    decode_threads: int
    precision: str
    device: str
    compiled: bool
    temperature: float
    images_per_s: float | None = None


def settings_key(scorer_digest: str) -> str:
    """Storage key of the settings of one scorer."""
    return f"settings-{scorer_digest[:16]}.json"


def stored_settings(
    store: Store, *, scorer_digest: str, temperature: float, device: str
) -> ScoreSettings | None:
    """The settings that the first run of the scorer stored; None where there was none.

    Args:
        store: score root.
        scorer_digest: whose settings.
        temperature, device: of this run.

    Raises:
        ConflictError: the first run used another temperature.
        ConfigError: the first run used a GPU and this one may not.
        DataError: the stored file is damaged.
    """
    key = settings_key(scorer_digest)
    try:
        stored = ScoreSettings(**json.loads(store.read(key)))
    except NotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{store.url}/{key} is damaged ({error}); score into a new paths.scores"
        ) from None
    if stored.temperature != temperature:
        raise ConflictError(
            f"{store.url} was begun with temperature {stored.temperature}, this run has "
            f"{temperature}; keep one scoring.temperature per paths.scores"
        )
    if stored.device == "cuda" and device == "cpu":
        raise ConfigError(
            f"{store.url} was begun on GPUs and this run is on the CPU, whose last bits differ; "
            "go on with GPUs (scoring.device cuda), or score into a new paths.scores"
        )
    return stored


def store_settings(store: Store, wanted: ScoreSettings, *, scorer_digest: str) -> ScoreSettings:
    """Store `wanted` as the settings of the scorer; returns those that stand: another run's, if it
    came first. Errors as `stored_settings`.
    """
    text = json.dumps(dataclasses.asdict(wanted), indent=2, sort_keys=True) + "\n"
    try:
        store.create(settings_key(scorer_digest), text.encode())
        return wanted
    except ConflictError:
        stored = stored_settings(
            store,
            scorer_digest=scorer_digest,
            temperature=wanted.temperature,
            device=wanted.device,
        )
        assert stored is not None
        return stored


def warn_of_other_settings(stored: ScoreSettings, asked: Mapping[str, object], where: str) -> None:
    """Say which settings were asked for in vain.

    Args:
        stored: what is used.
        asked: name -> value of this run; None: nothing was asked for.
        where: the score root.
    """
    for name, value in asked.items():
        old = getattr(stored, name)
        if value is not None and old != value:
            logger.warning(
                "%s %s was asked for; %s was begun with %s, which is adopted so that all score "
                "files are computed alike",
                name,
                value,
                where,
                old,
            )
