"""Training and validation data of a run."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from vlal_dist.config.sections import DataConfig, Section, TrainingConfig
from vlal_dist.data.format.dataset import Dataset, Split, open_split
from vlal_dist.data.format.scores import read_scores_manifest
from vlal_dist.data.loading.batch import Batch
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.disk_cache import DiskCache
from vlal_dist.data.loading.likelihoods import (
    ObjectLikelihoods,
    ReadLikelihoods,
    ScoreLikelihoods,
    rescaled_tar_likelihoods,
)
from vlal_dist.data.loading.loader import TrainLoader, evaluation_batches
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.mixture import Mixture, open_mixture
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.evaluation.predictions import Predictions, merge_predictions
from vlal_dist.evaluation.predictors import predict
from vlal_dist.method.metrics import Evaluation, evaluate_scores
from vlal_dist.storage.store import open_store, read_url
from vlal_dist.training.checkpoint import Checkpoint
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.settings import RunSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData(Mixture):
    """The opened data of a run.

    Attributes besides those of a mixture, which is what is trained on:
        validation: split that selects the model.
        read_likelihoods: where log-likelihoods are; None where none are needed.
    """

    validation: Split
    read_likelihoods: ReadLikelihoods | None


def open_sources(
    url: str,
    *,
    mix: Mapping[str, float],
    subset: str | None,
    repeat_threshold: float,
    scores_url: str | None,
    temperature: float | None,
    cache: Path,
    train_split: str,
    validation_split: str,
    weighted_by: str | None,
) -> RunData:
    """Open what is trained on and validated with.

    Args:
        url, mix, subset, repeat_threshold, cache: as `open_mixture` takes them.
        scores_url: root of score_clip; None: likelihoods are inside the tars.
        temperature: tau of Eq. (2); None: the scorer's. Likelihoods in tars are rescaled to it.
        train_split, validation_split: names.
        weighted_by: `likelihood`, `uniform` or `cooccurrence`: by what ignore sets are drawn; only
            the first looks for likelihoods. None: the loss draws none.

    Raises:
        ConfigError: a mix with score files, or keys that are of no sample.
        DataError: no such dataset or split, datasets that do not belong together, or no
            likelihoods where they are needed.
    """
    mixture = open_mixture(
        url,
        DataConfig(
            mix=dict(mix),
            subset=subset,
            repeat_threshold=repeat_threshold,
            train_split=train_split,
        ),
        cache=cache,
    )
    read: ReadLikelihoods | None = None
    if weighted_by == "likelihood":
        read = _clip_likelihoods(mixture, train_split, scores_url, temperature)
    elif weighted_by is not None:
        read = ObjectLikelihoods(
            mixture.corpus,
            mixture.dataset.feasible,
            cooccurrence=weighted_by == "cooccurrence",
        )
    return RunData(
        **vars(mixture),
        validation=open_split(mixture.dataset, validation_split),
        read_likelihoods=read,
    )


def _clip_likelihoods(
    mixture: Mixture, split: str, scores_url: str | None, temperature: float | None
) -> ReadLikelihoods:
    if scores_url is None:
        return _tar_likelihoods(mixture.trained, split, temperature)
    if len(mixture.corpus.splits) > 1:
        raise ConfigError("data.mix needs data.likelihood tar: score files belong to one root")
    return _score_likelihoods(mixture.dataset, mixture.corpus.splits[0], scores_url, temperature)


def _tar_likelihoods(
    trained: Sequence[Dataset], split: str, temperature: float | None
) -> ReadLikelihoods:
    temperatures = set()
    for one in trained:
        likelihood = one.manifest.get("likelihood")
        if likelihood is None or split not in likelihood["splits"]:
            raise DataError(
                f"{one.url}: the samples of split {split} carry no likelihood; run score_clip "
                "and shard_tools merge, or set method.loss to one that draws no ignore set"
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
    dataset: Dataset, split: Split, url: str, temperature: float | None
) -> ReadLikelihoods:
    store = open_store(url)
    manifest = read_scores_manifest(
        store,
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
    )
    return ScoreLikelihoods(
        split,
        scores=store,
        manifest=manifest,
        temperature=temperature or float(manifest["temperature"]),
        cache=dataset.cache,
    )


def read_prior(url: str, attributes: Sequence[str]) -> Tensor:
    """PSL's prior: column `mean_score` of an `attributes.parquet` that evaluate wrote.

    Args:
        url: path or URL of the file.
        attributes: names that the file must list, in order.

    Returns:
        float32 [A], mean probability of each attribute over the training split.

    Raises:
        ConfigError: no such file.
        DataError: other attributes, or no such column.
    """
    try:
        table = pyarrow.parquet.read_table(pa.BufferReader(read_url(url)))
        listed, mean_score = (table[column] for column in ("attribute", "mean_score"))
    except NotFoundError:
        raise ConfigError(
            f"method.psl_prior {url} does not exist; train loss ce_ignoring with this seed and run "
            "evaluate --evaluation.split train on it"
        ) from None
    except (pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"method.psl_prior {url} is no attributes.parquet: {error}") from None
    if listed.to_pylist() != list(attributes):
        raise DataError(
            f"method.psl_prior {url} lists other attributes than the dataset; evaluate a model of "
            "this dataset"
        )
    return torch.from_numpy(mean_score.to_numpy().astype(np.float32))


def make_validation(
    maker: BatchBuilder,
    *,
    model: torch.nn.Module,
    ranks: Ranks,
    groups: Mapping[str, Sequence[int]],
    batch_size: int,
    top_k: int,
    threshold: float,
) -> Callable[[Callable[[], bool]], Evaluation | None]:
    """A function that scores the validation split in float32: each rank takes neighbouring rows.

    All ranks must call it, and all get the same evaluation; or None, if before any batch any of
    them says that it is to stop.

    Args:
        maker: of the validation split.
        model: the model being trained, on the ranks' device.
        ranks: this process among its peers.
        groups: group name -> attribute ids.
        batch_size: samples per forward pass.
        top_k, threshold: as `evaluate_scores` takes them.
    """
    num_samples = len(maker.reader.corpus)
    # Neighbours, so that no block of a remote split is read by two ranks.
    rows = np.array_split(np.arange(num_samples, dtype=np.int64), ranks.world_size)[ranks.rank]

    most = -(-num_samples // ranks.world_size)  # rows of rank 0, which has no fewer than others
    steps = -(-most // batch_size)

    def validate(asked_to_stop: Callable[[], bool]) -> Evaluation | None:
        batches = evaluation_batches(maker, rows, batch_size=batch_size)
        stopped = False

        def in_step() -> Iterator[Batch]:
            nonlocal stopped
            for _ in range(steps):
                batch = ranks.together(lambda: next(batches, None))
                (stopped,) = ranks.agree(asked_to_stop())
                if stopped:
                    return
                if batch is not None:
                    yield batch

        with closing(batches):
            own = predict(
                model, in_step(), num_attributes=maker.num_attributes, device=ranks.device
            )
        if stopped:
            return None
        merged = merge_predictions(_gather(own, ranks), num_samples=num_samples)
        return evaluate_scores(merged.score, merged.label, groups, top_k=top_k, threshold=threshold)

    return validate


def _gather(own: Predictions, ranks: Ranks) -> list[Predictions]:
    """The predictions of all ranks, on every rank."""
    row, uid, score, label = (
        [part.cpu().numpy() for part in ranks.gather(torch.from_numpy(array).to(ranks.device))]
        for array in (own.row, own.uid.view(np.int64), own.score, own.label)
    )
    return [
        Predictions(row=r, uid=u.view(np.uint64), score=s, label=y)
        for r, u, s, y in zip(row, uid, score, label, strict=True)
    ]


def make_batches(
    settings: RunSettings, sources: RunData, ranks: Ranks, *, train: bool
) -> BatchBuilder:
    """What makes the batches of the training corpus, or of the validation split."""
    if settings.decode == "gpu" and ranks.device.type != "cuda":
        raise ConfigError(f"data.decode gpu: this rank runs on {ranks.device}; set data.decode cpu")
    if settings.decode == "gpu" and settings.damage == "quarantine":
        raise ConfigError(
            "data.decode gpu finds damage too late for data.damage quarantine: set cpu"
        )
    corpus = sources.corpus if train else ConcatSplits([sources.validation])
    return BatchBuilder(
        ShardReader(corpus, cache=_block_cache(settings, corpus)),
        sources.dataset,
        _section(DataConfig, settings, threads=settings.decode_threads),
        training=train,
        read_likelihoods=sources.read_likelihoods if train else None,
        pinned=ranks.device.type == "cuda",
    )


S = TypeVar("S", bound=Section)


def _section(kind: type[S], settings: RunSettings, *, threads: int) -> S:
    """The section whose fields the settings repeat."""
    named = {name: value for name, value in vars(settings).items() if name in kind.model_fields}
    return kind(**{**named, "threads": threads})


def _block_cache(settings: RunSettings, corpus: ConcatSplits) -> DiskCache | None:
    """The disk cache of this node, where the settings want one and a split is remote."""
    if not settings.cache_bytes or not corpus.remote:
        return None
    return DiskCache(
        settings.cache, limit_bytes=settings.cache_bytes, largest_bytes=corpus.largest_block
    )


def make_loader(
    settings: RunSettings, sources: RunData, found: Checkpoint | None, ranks: Ranks
) -> TrainLoader:
    """The stream; lanes and micro-batches are those of the first start."""
    first = found.state.binding if found else None
    loader = TrainLoader(
        make_batches(settings, sources, ranks, train=True),
        EpochPlan(sources.corpus, seed=settings.seed, passes=sources.passes, factor=sources.factor),
        _section(TrainingConfig, settings, threads=settings.torch_threads),
        rank=ranks.rank,
        world_size=ranks.world_size,
        lanes=first.lanes if first else 0,
        micro_batches=first.micro_batches if first else 0,
    )
    if loader.micro_batches % ranks.world_size:
        logger.info(
            "the %d micro-batches of a step are recut for %d ranks: BatchNorm sees other groups",
            loader.micro_batches,
            ranks.world_size,
        )
    return loader
