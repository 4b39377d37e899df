"""`clean --like`: the names, feasible sets and merge table of an earlier dataset, taken over."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from shard_tools.clean_files import check_merge_table
from shard_tools.clean_hide import HideRule
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.storage.store import open_store
from vlal_dist.vocabulary import Vocabulary


@dataclass(frozen=True)
class Like:
    """What `--like` takes over from an earlier dataset: names, feasible sets, merge table."""

    vocabulary: Vocabulary
    feasible: FeasibleSets
    merges: dict[str, str]


def open_like(url: str, *, hide: HideRule | None) -> Like:
    """Read an instances or dataset root.

    Args:
        url: the root.
        hide: which training labels the present cleaning hides.

    Raises:
        ConfigError: labels are to be hidden, and the root's own were not hidden in the same way.
        DataError: no such root, or files that are damaged or do not belong together.
        StorageError: the root cannot be read.
    """
    store = open_store(url)
    try:
        values = json.loads(store.read("vocabulary.json"))
        feasible = FeasibleSets.from_npz(store.read("feasible.npz"))
    except NotFoundError as error:
        raise DataError(
            f"--like {url}: {error}; give the root that clean, pack or merge wrote"
        ) from None
    except ValueError as error:
        raise DataError(f"--like {url} cannot be read: {error}; write that root again") from None
    vocabulary = Vocabulary.from_json(values)
    if feasible.num_objects != len(vocabulary.objects):
        raise DataError(
            f"--like {url}: feasible sets of {feasible.num_objects} objects, names of "
            f"{len(vocabulary.objects)}; the files do not belong together: write that root again"
        )
    _check_hidden(values, url=url, hide=hide)
    merges = check_merge_table(values.get("merges", {}), what=f"--like {url}: merges")
    return Like(vocabulary=vocabulary, feasible=feasible, merges=merges)


def _check_hidden(values: Mapping[str, object], *, url: str, hide: HideRule | None) -> None:
    """Refuse feasible sets and groups made of labels that the present cleaning may hide.

    Under the same rule and seed an instance that both datasets hold discloses the same labels.
    """
    if hide is None:
        return
    found, asked = values.get("hide", "none"), hide.to_json()
    seed = f" with seed {values['hide_seed']}" if "hide_seed" in values else ""
    if any(values.get(key) != value for key, value in asked.items()):
        raise ConfigError(
            f"--like {url} was cleaned with clean.hide {found}{seed}, this is clean.hide "
            f"{hide.name} with seed {hide.seed}: its feasible sets may come from labels that are "
            "hidden here; give a root cleaned with the same clean.hide and clean.hide_seed, or "
            "set clean.hide none"
        )
