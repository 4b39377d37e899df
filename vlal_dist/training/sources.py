"""What a run reads besides images: the dataset, its likelihoods, PSL's prior; and validation."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from vlal_dist.data.batches import BatchMaker, evaluation_batches
from vlal_dist.data.corpus import Corpus
from vlal_dist.data.dataset import Dataset, Split, open_dataset, open_split, read_labels
from vlal_dist.data.factors import repeat_factors, subset_factors
from vlal_dist.data.likelihoods import (
    ReadLikelihoods,
    ScoreLikelihoods,
    rescaled_tar_likelihoods,
)
from vlal_dist.data.scores import read_scores_manifest
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.evaluation.predict import predict
from vlal_dist.evaluation.predictions import Predictions, merge_predictions
from vlal_dist.method.metrics import Evaluation, evaluate_scores
from vlal_dist.storage.store import open_store
from vlal_dist.training.ranks import Ranks


@dataclass(frozen=True)
class Sources:
    """The opened data of a run.

    Attributes:
        dataset: vocabulary, feasible sets, digests; its validation split selects the model.
        corpus: what is trained on.
        passes: passes per epoch over each split of the corpus.
        factor: float64 [N], what each row's passes are multiplied by; None: 1.
        mix, subset: what the binding says of them.
        validation: split that selects the model.
        read_likelihoods: where log-likelihoods are; None where none are needed.
    """

    dataset: Dataset
    corpus: Corpus
    passes: tuple[float, ...]
    factor: npt.NDArray[np.float64] | None
    mix: str
    subset: str
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
    needs_likelihood: bool,
) -> Sources:
    """Open what is trained on and validated with.

    Args:
        url: root of merge, or of pack when likelihoods come from score files.
        mix: roots trained on together -> passes per epoch; empty: `url` once.
        subset: file with a sample key per line; None: all samples.
        repeat_threshold: of `repeat_factors`; 0: none.
        scores_url: root of score_clip; None: likelihoods are inside the tars.
        temperature: tau of Eq. (2); None: the scorer's. Likelihoods in tars are rescaled to it.
        cache: local folder for files of a remote root.
        train_split, validation_split: names.
        needs_likelihood: whether the loss draws ignore sets.

    Raises:
        ConfigError: a mix with score files, or keys that are of no sample.
        DataError: no such dataset or split, datasets that do not belong together, or no
            likelihoods where they are needed.
    """
    dataset = open_dataset(url, cache=cache)
    trained = [dataset if root == url else open_dataset(root, cache=cache) for root in mix or [url]]
    check_mix(dataset, trained)
    corpus = Corpus([open_split(one, train_split) for one in trained])
    factor, digest = _factors(trained, train_split, subset=subset, threshold=repeat_threshold)
    read = None
    if needs_likelihood and scores_url is None:
        read = _tar_likelihoods(trained, train_split, temperature)
    elif needs_likelihood:
        assert scores_url is not None
        if len(corpus.splits) > 1:
            raise ConfigError("data.mix needs data.likelihood tar: score files belong to one root")
        read = _score_likelihoods(dataset, corpus.splits[0], scores_url, temperature)
    named = [f"{one.digest[:16]} x {p:g}" for one, p in zip(trained, mix.values(), strict=False)]
    return Sources(
        dataset=dataset,
        corpus=corpus,
        passes=tuple(mix.values()) or (1.0,),
        factor=factor,
        mix=", ".join(named),
        subset=digest,
        validation=open_split(dataset, validation_split),
        read_likelihoods=read,
    )


def check_mix(dataset: Dataset, trained: Sequence[Dataset]) -> None:
    """Refuse datasets that cannot be trained on together.

    Raises:
        DataError: another vocabulary or other feasible sets, or two datasets of one name (their
            samples could share uids).
    """
    for one in trained:
        for what in ("vocabulary", "feasible"):
            digests = [getattr(d, what).digest for d in (one, dataset)]
            if digests[0] != digests[1]:
                raise DataError(
                    f"data.mix: {one.url} has {what} digest {digests[0]}, {dataset.url} has "
                    f"{digests[1]}; clean it again with --like {dataset.url}, then pack and merge"
                )
    names = [one.name for one in trained]
    if len(set(names)) < len(names):
        raise DataError(
            f"data.mix: the datasets are named {', '.join(names)}; give each its own pack.name: "
            "the uid of a sample depends on it"
        )


def _factors(
    trained: Sequence[Dataset], split: str, *, subset: str | None, threshold: float
) -> tuple[npt.NDArray[np.float64] | None, str]:
    """The factor of each row (None: 1 everywhere), and the digest of the list of keys."""
    if subset is None and threshold == 0:
        return None, ""
    tables = [read_labels(one, split) for one in trained]
    kept, digest = np.ones(sum(len(table) for table in tables), dtype=np.bool_), ""
    if subset is not None:
        root, _, name = subset.rpartition("/")
        text = open_store(root or ".").read(name)
        kept = subset_factors([table["key"] for table in tables], text.decode().split())
        digest = hashlib.sha256("\n".join(sorted(set(text.decode().split()))).encode()).hexdigest()
    if threshold == 0:
        return kept.astype(np.float64), digest
    repeats = repeat_factors([table["positive"] for table in tables], kept, threshold=threshold)
    return repeats * kept, digest


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
    root, _, name = url.rpartition("/")
    try:
        table = pyarrow.parquet.read_table(pa.BufferReader(open_store(root or ".").read(name)))
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
    maker: BatchMaker,
    *,
    model: torch.nn.Module,
    ranks: Ranks,
    groups: Mapping[str, Sequence[int]],
    batch_size: int,
    top_k: int,
    threshold: float,
) -> Callable[[], Evaluation]:
    """A function that scores the validation split in float32: rank r takes rows r, r + W, ...

    All ranks must call it, and all get the same evaluation.

    Args:
        maker: of the validation split.
        model: the model being trained, on the ranks' device.
        ranks: this process among its peers.
        groups: group name -> attribute ids.
        batch_size: samples per forward pass.
        top_k, threshold: as `evaluate_scores` takes them.
    """
    num_samples = len(maker.reader.corpus)
    rows = np.arange(ranks.rank, num_samples, ranks.world_size, dtype=np.int64)

    def validate() -> Evaluation:
        def predict_own() -> Predictions:
            batches = evaluation_batches(maker, rows, batch_size=batch_size)
            return predict(model, batches, num_attributes=maker.num_attributes, device=ranks.device)

        own = ranks.together(predict_own)
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
