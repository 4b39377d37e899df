"""Training samples: one dataset or a mix of several, a subset by keys, tail samples repeated."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlal_dist.config.sections import DataConfig
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split, read_labels
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.data.order.epoch_plan import ONE, fixed_rate
from vlal_dist.data.order.sampling_rates import repeat_factors, subset_factors
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.storage.store import read_url


@dataclass(frozen=True)
class Mixture:
    """The opened training samples, and how often each is visited.

    Attributes:
        dataset: vocabulary, feasible sets, digests; its validation split selects the model.
        trained: the datasets whose training splits the corpus holds, in order.
        corpus: the training samples.
        passes: passes per epoch over each split of the corpus.
        factor: float64 [N], what each row's passes are multiplied by; None: 1.
        mix, subset: their entries in a run's binding.
    """

    dataset: Dataset
    trained: list[Dataset]
    corpus: ConcatSplits
    passes: tuple[float, ...]
    factor: npt.NDArray[np.float64] | None
    mix: str
    subset: str

    @property
    def num_samples(self) -> int:
        """Samples that are trained on at all."""
        return len(self.corpus) if self.factor is None else int(np.count_nonzero(self.factor))


def open_mixture(url: str, data: DataConfig, *, cache: Path) -> Mixture:
    """Open the training samples.

    Args:
        url: root of merge, or of pack when likelihoods come from score files.
        data: `mix`, `subset`, `repeat_threshold` and `train_split` are read.
        cache: local folder for files of a remote root.

    Raises:
        ConfigError: `data.subset` lists keys that no sample has.
        DataError: no such dataset or split, or datasets that do not belong together.
    """
    dataset = open_dataset(url, cache=cache)
    roots = data.mix or {url: 1.0}
    trained = [dataset if root == url else open_dataset(root, cache=cache) for root in roots]
    check_mix(dataset, trained)
    corpus = ConcatSplits([open_split(one, data.train_split) for one in trained])
    factor, digest = _factors(trained, data)
    named = [
        f"{one.digest[:16]} x {fixed_rate(p)}/{ONE}"
        for one, p in zip(trained, data.mix.values(), strict=False)
    ]
    return Mixture(
        dataset=dataset,
        trained=trained,
        corpus=corpus,
        passes=tuple(roots.values()),
        factor=factor,
        mix=", ".join(named),
        subset=digest,
    )


def check_mix(dataset: Dataset, trained: Sequence[Dataset]) -> None:
    """Refuse datasets that cannot be mixed.

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
    trained: Sequence[Dataset], data: DataConfig
) -> tuple[npt.NDArray[np.float64] | None, str]:
    """The factor of each row (None: 1 everywhere), and the digest of the list of keys."""
    subset, threshold = data.subset, data.repeat_threshold
    if subset is None and threshold == 0:
        return None, ""
    columns = (["key"] if subset is not None else []) + (["positive"] if threshold else [])
    tables = [read_labels(one, data.train_split, columns=columns) for one in trained]
    kept, digest = np.ones(sum(len(table) for table in tables), dtype=np.bool_), ""
    if subset is not None:
        try:
            wanted = sorted(set(read_url(subset).decode().split()))
        except (NotFoundError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.subset: {subset} cannot be read ({error}); give a text file (UTF-8) with a "
                "sample's key per line"
            ) from None
        kept = subset_factors([table["key"] for table in tables], wanted)
        digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    if threshold == 0:
        return kept.astype(np.float64), digest
    repeats = repeat_factors([table["positive"] for table in tables], kept, threshold=threshold)
    return repeats * kept, digest
