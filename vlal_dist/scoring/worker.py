"""Everything one scoring process holds open: dataset, model, text bank. Knows nothing of Ray.

`ScoringJob` is plain data that travels to the workers; `ShardScorer` is what each makes of it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vlal_dist.data.dataset import Dataset, Split, open_dataset, open_split
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.scoring.clip import ClipEncoder, load_clip
from vlal_dist.scoring.identity import ScorerIdentity, ScoreSettings
from vlal_dist.scoring.score_shard import ShardResult, score_shard
from vlal_dist.scoring.text_bank import TextBank, ensure_bank
from vlal_dist.storage.store import open_store

logger = logging.getLogger(__name__)


def never() -> bool:
    """Nobody asks this worker to stop."""
    return False


@dataclass(frozen=True)
class ScoringJob:
    """What a worker needs to know; plain values, no credentials.

    Attributes:
        dataset: dataset root, absolute path or URL.
        cache: local folder for index files of a remote root, absolute.
        scores: score root, absolute path or URL.
        model: open_clip model name.
        model_config_dir: folder of further model configs, or None.
        weights: weights file or tag.
        templates: prompt templates.
        scorer_digest: what the driver computed; each worker must find the same.
        settings: how to compute.
        decode_threads: decoding threads per worker.
    """

    dataset: str
    cache: str
    scores: str
    model: str
    model_config_dir: str | None
    weights: str | None
    templates: tuple[str, ...]
    scorer_digest: str
    settings: ScoreSettings
    decode_threads: int


class ShardScorer:
    """One worker's open model and dataset.

    Args:
        job: what to score.
        stopped: asked between batches.

    Raises:
        ConfigError: weights or GPU absent on this node.
        DataError: dataset or weights here are not those of the driver.
    """

    def __init__(self, job: ScoringJob, *, stopped: Callable[[], bool] = never) -> None:
        self.job, self.stopped = job, stopped
        if job.settings.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "these scores are computed on cuda and this node has no usable GPU; run where "
                "there is one, or score with scoring.device cpu into a new paths.scores"
            )
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(job.settings.threads)
        self.dataset = open_dataset(job.dataset, cache=Path(job.cache))
        self.encoder = load_clip(
            model=job.model,
            model_config_dir=job.model_config_dir,
            weights=job.weights,
            precision=job.settings.precision,
            device=job.settings.device,
            batch_size=job.settings.batch_size,
        )
        found = identify(self.encoder, self.dataset, model=job.model, templates=job.templates)
        if found.digest != job.scorer_digest:
            raise DataError(
                f"scorer digest {found.digest} on this node, {job.scorer_digest} on the driver; "
                f"dataset {job.dataset} or weights {job.weights} differ between nodes: give all "
                "of them the same files"
            )
        self.store = open_store(job.scores)
        self._splits: dict[str, Split] = {}
        self._bank: TextBank | None = None

    def prepare_text(self) -> int:
        """Make sure that the text bank is committed, and hold it; returns its pairs."""
        if self._bank is None:
            self._bank = ensure_bank(
                self.store,
                self.encoder,
                self.dataset.vocabulary,
                self.dataset.feasible,
                templates=self.job.templates,
                scorer_digest=self.job.scorer_digest,
                stopped=self.stopped,
            )
        return len(self._bank)

    def score(self, split: str, shard: int) -> ShardResult:
        """Score one shard; see `score_shard`."""
        if split not in self._splits:
            self._splits[split] = open_split(self.dataset, split)
        self.prepare_text()
        assert self._bank is not None
        return score_shard(
            self._splits[split],
            shard,
            store=self.store,
            encoder=self.encoder,
            bank=self._bank,
            feasible=self.dataset.feasible,
            header={
                "scorer_digest": self.job.scorer_digest,
                "feasible_digest": self.dataset.feasible.digest,
                "vocabulary_digest": self.dataset.vocabulary.digest,
                "temperature": repr(self.job.settings.temperature),
            },
            decode_threads=self.job.decode_threads,
            stopped=self.stopped,
        )

    def close(self) -> None:
        """Give the process back its torch threads."""
        torch.set_num_threads(self._threads_before)


def identify(
    encoder: ClipEncoder, dataset: Dataset, *, model: str, templates: tuple[str, ...]
) -> ScorerIdentity:
    """The identity of a loaded model with a dataset's feasible sets."""
    return ScorerIdentity(
        model=model,
        weights_digest=encoder.weights_digest,
        preprocessing_digest=encoder.preprocessing_digest,
        templates=templates,
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
        precision=encoder.precision,
    )
