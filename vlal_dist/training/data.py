"""Training and validation data of a run: datasets, likelihoods, batch builders, loader."""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vlal_dist.config.sections import (
    DataConfig,
    LossConfig,
    PathsConfig,
    ScoringConfig,
    TrainingConfig,
)
from vlal_dist.data.format.dataset import Split, open_split, read_labels
from vlal_dist.data.format.index import decode_table
from vlal_dist.data.format.scores import read_scores_manifest
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.loading.likelihoods import (
    ObjectLikelihoods,
    ReadLikelihoods,
    ScoreLikelihoods,
    rescaled_tar_likelihoods,
)
from vlal_dist.data.loading.loader import TrainLoader
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.mixture import Mixture, open_mixture
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.method.feasible import largest_num_ignore
from vlal_dist.remarks import remark
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import open_store, read_url
from vlal_dist.training.checkpoint import Binding
from vlal_dist.training.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData(Mixture):
    """The opened data of a run: the mixture that is trained on, and the validation split.

    Attributes:
        config: image size, decoding, damage, caches.
        validation: split that selects the best model.
        read_likelihoods: reads the log-likelihoods that weigh the draw; None: nothing is drawn.
        scores: digest of the manifest of the score files; empty: none are read.
    """

    config: DataConfig
    validation: Split
    read_likelihoods: ReadLikelihoods | None
    scores: str

    def digests(self) -> dict[str, str]:
        """What is read, by content: equal on all ranks, wherever their copies lie."""
        found = {"dataset digest": self.dataset.digest, "scores digest": self.scores}
        return found | {"digests of data.mix": self.mix, "digest of data.subset": self.subset}

    def own_digests(self, packed: str) -> list[str]:
        """Digests of the run's own dataset: as trained on, its source, and what `packed` holds.

        Args:
            packed: `paths.dataset`, which evaluate reads.
        """
        likelihood = self.dataset.manifest.get("likelihood") or {}
        found = [self.dataset.digest, str(likelihood.get("source_digest", ""))]
        with suppress(NotFoundError):
            found.append(sha256_of(open_store(packed).read("dataset.json")))
        return sorted({digest for digest in found if digest})

    def check_validation(self, unannotated: str) -> None:
        """Warn where no attribute of the validation split can be scored (`counted_labels`)."""
        table = read_labels(self.dataset, self.validation.name, columns=["positive", "negative"])
        width = len(self.dataset.vocabulary.attributes)
        has, lacks = (
            np.bincount(table[column].combine_chunks().flatten(), minlength=width)
            for column in ("positive", "negative")
        )
        if unannotated == "negative":
            lacks = len(table) - has
        if ((has > 0) & (lacks > 0)).any():
            return
        remedy = "annotate some, or name another data.validation_split"
        if unannotated == "excluded" and not lacks.any():
            remedy = (
                "if the data lists only what is present (tags), set evaluation.unannotated "
                f"negative; else {remedy}"
            )
        remark(
            logger,
            "evaluation.unannotated",
            "split %s: no attribute has both a positive and a negative, so the validation mAP is "
            "undefined: the latest model is kept as the best, and the plateau schedule never cuts; "
            "%s",
            self.validation.name,
            remedy,
        )

    def check_num_ignore(self, num_ignore: int | Literal["all"]) -> None:
        """Warn where NUM_IGNORE takes more than a quarter of the mean feasible set."""
        sizes = np.diff(self.dataset.feasible.indptr)
        sums = [float(sizes[split.index.object_id].sum()) for split in self.corpus.splits]
        mean = sum(sums) / max(len(self.corpus), 1)
        most = largest_num_ignore(mean)
        if num_ignore != "all" and num_ignore > most:
            remark(
                logger,
                "method.num_ignore",
                "method.num_ignore is %d, more than a quarter of the mean feasible set of the "
                "training instances (%.1f attributes), which leaves little of a set to the loss; "
                "give at most %d (docs/your-data.md)",
                num_ignore,
                mean,
                most,
            )

    def make_builder(self, ranks: Ranks, *, train: bool) -> BatchBuilder:
        """Make the batch builder of the training corpus (`train`), or of the validation split.

        Raises:
            ConfigError: `data.decode gpu` on a CPU, or with `data.damage quarantine`.
        """
        config, on_gpu = self.config, ranks.device.type == "cuda"
        if config.decode == "gpu" and not on_gpu:
            raise ConfigError(
                f"data.decode gpu: this rank runs on {ranks.device}; set data.decode cpu"
            )
        if config.decode == "gpu" and config.damage == "quarantine":
            raise ConfigError(
                "data.decode gpu finds damage too late for data.damage quarantine: set cpu"
            )
        corpus = self.corpus if train else ConcatSplits([self.validation])
        cache = None
        if config.cache_bytes and corpus.remote:
            limit = config.cache_bytes
            cache = DiskCache(
                self.dataset.cache, limit_bytes=limit, largest_bytes=corpus.largest_block
            )
        return BatchBuilder(
            ShardReader(corpus, cache=cache),
            self.dataset,
            config,
            training=train,
            read_likelihoods=self.read_likelihoods if train else None,
            pinned=on_gpu,
        )

    def make_loader(
        self, training: TrainingConfig, ranks: Ranks, *, first: Binding | None
    ) -> TrainLoader:
        """Make the training loader.

        Args:
            training: batch size, accumulation, seed.
            ranks: this process among its peers.
            first: binding of a resumed run, whose lanes and micro-batches stay.
        """
        loader = TrainLoader(
            self.make_builder(ranks, train=True),
            EpochPlan(self.corpus, seed=training.seed, passes=self.passes, factor=self.factor),
            training,
            rank=ranks.rank,
            world_size=ranks.world_size,
            lanes=first.lanes if first else 0,
            micro_batches=first.micro_batches if first else 0,
        )
        if loader.micro_batches % ranks.world_size:
            logger.info(
                "the %d micro-batches of a step are cut differently for %d ranks: BatchNorm sees "
                "other groups of samples",
                loader.micro_batches,
                ranks.world_size,
            )
        return loader


def open_data(
    paths: PathsConfig, data: DataConfig, loss: LossConfig, scoring: ScoringConfig
) -> TrainingData:
    """Open the training and validation splits, and the likelihoods if the loss draws by them.

    Args:
        paths: `merged`, or with `data.likelihood scores` `dataset` and `scores`; `cache`.
        data: splits, mixture, subset, where likelihoods are.
        loss: whether ignore sets are drawn, and by what weights.
        scoring: `temperature` of Eq. (2); None: the scorer's. Likelihoods in tars are rescaled.

    Raises:
        ConfigError: a mixture with score files, or keys that no sample has.
        DataError: no such dataset or split, datasets that do not belong together, or no
            likelihoods where they are needed.
    """
    url = paths.merged if data.likelihood == "tar" else paths.dataset
    mixture = open_mixture(url, data, cache=Path(paths.cache))
    validation = open_split(mixture.dataset, data.validation_split)
    _check_not_empty(mixture, validation, data)
    read: ReadLikelihoods | None
    scores = ""
    if loss.loss != "selective" or loss.num_ignore in ("all", 0):
        read = None  # none or all of a set: nothing is drawn
    elif loss.draw_weights != "likelihood":
        read = ObjectLikelihoods(
            mixture.corpus,
            mixture.dataset.feasible,
            cooccurrence=loss.draw_weights == "cooccurrence",
        )
    elif data.likelihood == "tar":
        read = _tar_likelihoods(mixture, data.train_split, scoring.temperature)
    else:
        read, scores = _score_likelihoods(mixture, paths.scores, scoring.temperature)
    return TrainingData(
        **vars(mixture),
        config=data,
        validation=validation,
        read_likelihoods=read,
        scores=scores,
    )


def _check_not_empty(mixture: Mixture, validation: Split, data: DataConfig) -> None:
    """Refuse to train or select by a split without samples.

    Raises:
        DataError: naming the split.
    """
    remedy = "see rejects.parquet of clean and pack, or name another split"
    if len(mixture.corpus) == 0:
        roots = ", ".join(one.url for one in mixture.trained)
        raise DataError(
            f"{roots}: split {data.train_split} holds no samples, so there is nothing to train on; "
            f"{remedy} (data.train_split)"
        )
    if mixture.num_samples == 0:
        raise DataError("data.subset leaves no samples to train on; list other keys, or unset it")
    if validation.num_samples == 0:
        raise DataError(
            f"{mixture.dataset.url}: split {validation.name} holds no samples, so no model can be "
            f"selected; {remedy} (data.validation_split)"
        )


def _tar_likelihoods(mixture: Mixture, split: str, temperature: float | None) -> ReadLikelihoods:
    temperatures = set()
    for one in mixture.trained:
        likelihood = one.manifest.get("likelihood")
        if likelihood is None or split not in likelihood["splits"]:
            raise DataError(
                f"{one.url}: the samples of split {split} carry no likelihood; run vlal score "
                "and vlal merge, or set method.loss to one that draws no ignore set"
            )
        temperatures.add(float(likelihood["temperature"]))
    if len(temperatures) > 1:
        raise DataError(
            f"data.mix: the likelihoods were merged at the temperatures {sorted(temperatures)}; "
            "merge all with one scoring.temperature"
        )
    (merged_at,) = temperatures
    return rescaled_tar_likelihoods(merged_at=merged_at, temperature=temperature or merged_at)


def _score_likelihoods(
    mixture: Mixture, url: str, temperature: float | None
) -> tuple[ReadLikelihoods, str]:
    """The likelihoods of score files, and the digest of their manifest."""
    if len(mixture.corpus.splits) > 1:
        raise ConfigError("data.mix needs data.likelihood tar: score files belong to one dataset")
    dataset, store = mixture.dataset, open_store(url)
    manifest = read_scores_manifest(
        store,
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
    )
    read = ScoreLikelihoods(
        mixture.corpus.splits[0],
        scores=store,
        manifest=manifest,
        temperature=temperature or float(manifest["temperature"]),
        cache=dataset.cache,
    )
    return read, sha256_of(json.dumps(manifest, sort_keys=True).encode())


def read_prior(url: str | None, attributes: Sequence[str], *, micro_batches: int) -> Tensor:
    """PSL's prior: column `mean_score` of an `attributes.parquet` that evaluate wrote.

    Args:
        url: path or URL of the file: `method.psl_prior`.
        attributes: names that the file must list, in order.
        micro_batches: of each rank in a step.

    Returns:
        float32 [A], mean probability of each attribute over the training split.

    Raises:
        ConfigError: no such file, or more than one micro-batch, which PSL cannot do.
        DataError: other attributes, or no such column.
    """
    if url is None:
        raise ConfigError(
            "method.loss psl needs method.psl_prior: the attributes.parquet that "
            "`evaluate --evaluation.split train` writes for the CE-ignoring model of this seed"
        )
    if micro_batches > 1:
        raise ConfigError(
            f"method.loss psl chooses over the whole batch, but each rank runs {micro_batches} "
            "micro-batches per step; set training.accumulation 1, and resume with as many ranks "
            "as at the first start"
        )
    try:
        data = read_url(url)
    except NotFoundError:
        raise ConfigError(
            f"method.psl_prior {url} does not exist; train loss ce_ignoring with this seed and run "
            "evaluate --evaluation.split train on it"
        ) from None
    schema = pa.schema([("attribute", pa.string()), ("mean_score", pa.float64())])
    table = decode_table(
        data,
        schema,
        where=f"method.psl_prior {url}",
        remedy="give an attributes.parquet that evaluate wrote",
    )
    mean_score = table["mean_score"].to_numpy()
    if not ((mean_score >= 0) & (mean_score <= 1)).all():
        raise DataError(f"method.psl_prior {url} has a mean score outside [0, 1]; evaluate again")
    if table["attribute"].to_pylist() != list(attributes):
        raise DataError(
            f"method.psl_prior {url} lists other attributes than the dataset; evaluate a model of "
            "this dataset"
        )
    return torch.from_numpy(mean_score.astype(np.float32))
