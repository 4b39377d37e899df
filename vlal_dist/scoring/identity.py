"""The scoring job: what every worker is given, the scorer's identity, and the adopted settings.

The digest of the identity covers everything that changes the meaning of a similarity. The settings
change only its last bits (batch shape, threads, device): the first run under a scorer stores them
before its first output, and every later run adopts them, so that equal files stay equal.
"""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import TypedDict

from vlal_dist.config.sections import ScoringConfig
from vlal_dist.contents import parse_json
from vlal_dist.data.format.dataset import Dataset
from vlal_dist.data.format.scores import score_key
from vlal_dist.errors import ConfigError, ConflictError, DataError, NotFoundError
from vlal_dist.remarks import remark
from vlal_dist.scoring.clip import HUB, ClipEncoder
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the scoring procedure (crop, similarity); part of the scorer digest."""


@dataclass(frozen=True)
class ScorerIdentity:
    """All that a similarity depends on, besides the crop.

    Attributes:
        model: open_clip model name, or a digest of the config (clip.py: architecture).
        weights_digest: sha256 of the weights.
        preprocessing_digest: sha256 of the model's preprocessing settings.
        templates: prompt templates; with lists by attribute type, pairs of type and list.
        feasible_digest: digest of the feasible sets.
        vocabulary_digest: digest of the names.
        precision: encoder arithmetic.
    """

    model: str
    weights_digest: str
    preprocessing_digest: str
    templates: tuple[object, ...]
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


def identify(encoder: ClipEncoder, dataset: Dataset, scoring: ScoringConfig) -> ScorerIdentity:
    """The identity of a loaded model with the prompts and a dataset's feasible sets."""
    return ScorerIdentity(
        model=encoder.architecture,
        weights_digest=encoder.weights_digest,
        preprocessing_digest=encoder.preprocessing_digest,
        templates=_plain(scoring.templates),
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
        precision=scoring.precision,
    )


def _plain(templates: list[str] | dict[str, list[str]]) -> tuple[object, ...]:
    """Templates as values whose order says nothing but that of a list."""
    if isinstance(templates, list):
        return tuple(templates)
    return tuple((kind, tuple(some)) for kind, some in sorted(templates.items()))


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps({**values, "format": FORMAT}, sort_keys=True, separators=(",", ":"))
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
        images_per_s: crops per second and actor that the warm-up predicts; None without a warm-up.
    """

    batch_size: int
    threads: int
    decode_threads: int
    precision: str
    device: str
    compiled: bool
    temperature: float
    images_per_s: float | None = None


@dataclass(frozen=True)
class ScoringJob:
    """What a worker is given: plain values that travel through Ray, no credentials.

    Attributes:
        scoring: the config section; its paths are absolute.
        dataset: dataset root, absolute path or URL.
        scores: score root, absolute path or URL.
        cache: local folder for index files of a remote root, absolute.
        identity: of the scorer on the driver; each worker must find the same.
        device: cpu or cuda.
        temperature: tau of Eq. (2).
        embeddings_manifest: `scores.json` of `scoring.embeddings`, empty where there are none.
    """

    scoring: ScoringConfig
    dataset: str
    scores: str
    cache: str
    identity: ScorerIdentity
    device: str
    temperature: float
    embeddings_manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Torch threads of a worker."""
        return max(1, int(self.scoring.cpus_per_actor))

    @property
    def digests(self) -> dict[str, str]:
        """What score files and `scores.json` are bound to, as their headers name it."""
        return {
            "scorer_digest": self.identity.digest,
            "feasible_digest": self.identity.feasible_digest,
            "vocabulary_digest": self.identity.vocabulary_digest,
        }

    def score_key(self, split: str, shard_sha256: str) -> str:
        """Storage key of the score file of a shard."""
        return score_key(split, shard_sha256=shard_sha256, scorer_digest=self.identity.digest)

    def settings(
        self, batch_size: int, decode_threads: int, images_per_s: float | None = None
    ) -> ScoreSettings:
        """The settings of a first run with this job."""
        return ScoreSettings(
            batch_size=batch_size,
            threads=self.threads,
            decode_threads=decode_threads,
            precision=self.scoring.precision,
            device=self.device,
            compiled=self.scoring.compile,
            temperature=self.temperature,
            images_per_s=images_per_s,
        )


class _Weights(TypedDict):
    weights: str
    weights_digest: str


WEIGHTS = "weights.json"
"""Storage key of the digest of the weights with which a score root was created."""


def check_same_weights(store: Store, job: ScoringJob, *, keep: bool) -> None:
    """Compare the weights with those under the same name with which the root was created.

    Otherwise another revision in a cache, or a file that was replaced, would begin a second scorer
    beside the first, silently.

    Args:
        store: score root.
        job: names the weights, and has their digest.
        keep: store the digest where there is none yet.

    Raises:
        DataError: the same name, and other weights.
    """
    name = job.scoring.weights or job.scoring.model
    if not name.startswith(HUB):
        name = name.rpartition("/")[2]  # not the folder, which is this machine's alone
    mine = {"weights": name, "weights_digest": job.identity.weights_digest}
    try:
        data = store.read(WEIGHTS)
    except NotFoundError:
        if keep:
            store.create(WEIGHTS, json.dumps(mine, indent=2).encode() + b"\n")
        return
    theirs: _Weights = parse_json(
        data, _Weights, where=f"{store.url}/{WEIGHTS}", remedy="score into a new paths.scores"
    )
    if theirs["weights"] == name and theirs["weights_digest"] != mine["weights_digest"]:
        raise DataError(
            f"{store.url} was made with weights {name} of sha256 {theirs['weights_digest']}, and "
            f"they now have {mine['weights_digest']}: the file was replaced, or this machine has "
            "another revision of it; bring back the former one, or score into a new paths.scores"
        )


def settings_key(scorer_digest: str) -> str:
    """Storage key of the settings of one scorer."""
    return f"settings-{scorer_digest[:16]}.json"


def stored_settings(store: Store, job: ScoringJob) -> ScoreSettings | None:
    """The settings that the first run of the job's scorer stored; None before it.

    Raises:
        ConflictError: the first run used another temperature.
        ConfigError: the first run used a GPU and this one runs on the CPU.
        DataError: the stored file is damaged.
    """
    key = settings_key(job.identity.digest)
    try:
        data = store.read(key)
    except NotFoundError:
        return None
    stored: ScoreSettings = parse_json(
        data, ScoreSettings, where=f"{store.url}/{key}", remedy="score into a new paths.scores"
    )
    if stored.temperature != job.temperature:
        raise ConflictError(
            f"{store.url} was created with temperature {stored.temperature}, this run has "
            f"{job.temperature}; keep one scoring.temperature per paths.scores"
        )
    if stored.device == "cuda" and job.device == "cpu":
        raise ConfigError(
            f"{store.url} was created on GPUs and this run is on the CPU, whose last bits differ; "
            "continue with scoring.device cuda, or score into a new paths.scores"
        )
    return stored


def store_settings(store: Store, job: ScoringJob, settings: ScoreSettings) -> ScoreSettings:
    """Store the settings of the job's scorer; returns those that stand: another run's, if it came
    first. Errors as `stored_settings`.
    """
    text = json.dumps(dataclasses.asdict(settings), indent=2, sort_keys=True) + "\n"
    try:
        store.create(settings_key(job.identity.digest), text.encode())
        return settings
    except ConflictError:
        stored = stored_settings(store, job)
        assert stored is not None
        return stored


def warn_of_ignored(settings: ScoreSettings, job: ScoringJob) -> None:
    """Log which values of this run's config give way to the stored settings."""
    given = {
        "batch_size": job.scoring.batch_size,
        "decode_threads": job.scoring.decode_threads,
        "threads": job.threads,
        "device": job.device,
        "compiled": job.scoring.compile,
    }
    for name, value in given.items():
        used = getattr(settings, name)
        if value is not None and value != used:
            remark(
                logger,
                f"scoring.{name}",
                "ignoring %s=%s: %s was created with %s=%s",
                name,
                value,
                job.scores,
                name,
                used,
            )
