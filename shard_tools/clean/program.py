"""Program `clean`: annotation files to instances, vocabulary and feasible sets (Sec. 3.1, 2.2).

Everything is checked and computed before the first file is written; the files are create-only and
depend on the input alone, so the command can be repeated after any interruption.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from shard_tools.clean.counts import (
    HIDE_QUANTITIES,
    SPLITS,
    StepCounts,
    check_expected,
    first_departure,
)
from shard_tools.clean.files import (
    check_merge_table,
    instances_table,
    json_bytes,
    parquet_bytes,
    read_merge_table,
    read_name_lists,
    read_records,
    rejects_table,
    write_root,
)
from shard_tools.clean.hide import HideRule, hidden_files, hide_rule
from shard_tools.clean.records import Instance, Reject, drop_duplicates, parse_records
from shard_tools.clean.steps import Cleaned, MergeRule, clean_instances
from shard_tools.clean.vocabulary import (
    attribute_types,
    build_feasible_sets,
    enlarge,
    listed_prevalence,
    prevalence_by_count,
)
from shard_tools.clean.wordnet import WordNet, merge_table
from vlal_dist.config.sections import CleanConfig, Config
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.program import Counts, Program
from vlal_dist.storage.store import open_store
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


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


def clean(config: Config, flags: Mapping[str, str]) -> Counts:
    """Clean the annotations of `config.clean` into the root `config.paths.instances`.

    Raises:
        ConfigError: settings that contradict each other, or WordNet is absent.
        DataError: unreadable annotations, conflicting ids, or (after all is written) more rejects
            than `clean.max_rejected`.
        StorageError: the root cannot be written.
    """
    settings = config.clean
    hide = hide_rule(settings.hide, seed=settings.hide_seed)
    like = open_like(flags["like"], hide=hide) if "like" in flags else None
    _check_settings(settings, like=like)
    merge = _merge_rule(settings, like)
    open_store(config.paths.instances).list_keys("clean.json")  # a wrong bucket is told now
    instances, rejects = _read_annotations(settings)
    num_records = len(instances) + len(rejects)
    cleaned = _run_steps(instances, settings, merge=merge, like=like, hide=hide)
    rejects += cleaned.rejects
    _check_left(cleaned, num_rejected=len(rejects))
    vocabulary = like.vocabulary if like else _make_vocabulary(cleaned, settings)
    tables = {
        split: instances_table([i for i in cleaned.instances if i.split == split], vocabulary)
        for split in settings.annotations
    }
    feasible = like.feasible if like else _make_feasible(tables, vocabulary, settings)
    counts = {**cleaned.counts, "feasible": {"pairs": len(feasible.indices)}}
    rule = hide.to_json() if hide else {}
    manifest: Counts = {
        "vocabulary_digest": vocabulary.digest,
        "feasible_digest": feasible.digest,
        "records": num_records,
        "splits": {split: table.num_rows for split, table in tables.items()},
        "rejected": len(rejects),
        "clashes": cleaned.clashes,
        "counts": counts,
        **rule,
    }
    names = {**vocabulary.to_json(), "merges": cleaned.merges, "counts": counts, **rule}
    files = {"vocabulary.json": json_bytes(names), "feasible.npz": feasible.to_npz()}
    files |= {f"{split}.parquet": parquet_bytes(table) for split, table in tables.items()}
    files["rejects.parquet"] = parquet_bytes(rejects_table(rejects))
    files |= hidden_files(cleaned.hidden, vocabulary)
    write_root(open_store(config.paths.instances), files, manifest)
    _check_rejected(len(rejects), num_records, config)
    return {
        "records": num_records,
        "instances": len(cleaned.instances),
        "splits": manifest["splits"],
        "objects": len(vocabulary.objects),
        "attributes": len(vocabulary.attributes),
        "feasible_pairs": len(feasible.indices),
        "clashes": cleaned.clashes,
        "rejected": len(rejects),
        **{name: counts["hide"][name] for name in HIDE_QUANTITIES if hide},
        **_compare(counts, settings),
    }


def _check_settings(settings: CleanConfig, *, like: Like | None) -> None:
    if not settings.annotations:
        raise ConfigError(
            "clean.annotations is empty; give the annotation files of each split, for example "
            "--clean.annotations '{train: [train.json], val: [val.json], test: [test.json]}'"
        )
    unknown = [split for split in settings.annotations if split not in SPLITS]
    if unknown:
        raise ConfigError(
            f"clean.annotations has the split {unknown[0]!r}; splits are {', '.join(SPLITS)}"
        )
    if settings.merge == "table" and settings.merge_table is None:
        raise ConfigError(
            "clean.merge is table, but clean.merge_table is not set; give a JSON of name -> "
            "representative, or the vocabulary.json of an earlier clean"
        )
    check_expected(settings.expected)
    if like is not None:
        return
    absent = [split for split in settings.feasible_splits if split not in settings.annotations]
    if absent or not settings.feasible_splits:
        raise ConfigError(
            f"clean.feasible_splits is {settings.feasible_splits}, clean.annotations has "
            f"{list(settings.annotations)}; name splits that are there, or use --like DATASET to "
            "take the feasible sets of an earlier dataset"
        )
    if settings.feasible_top_k > 0 and settings.object_vectors is None:
        raise ConfigError(
            f"clean.feasible_top_k is {settings.feasible_top_k}, which needs "
            "clean.object_vectors: CLIP text vectors of the object names. Run this command first "
            "with --clean.feasible_top_k 0 and another --paths.instances NAMES, then `python -m "
            "vlal_dist.score_clip --object-vectors FILE --paths.instances NAMES`, then this one "
            "with --clean.object_vectors FILE"
        )


def _merge_rule(settings: CleanConfig, like: Like | None) -> MergeRule:
    """How names are merged; with `--like` by that dataset's table, for the same names again."""
    if settings.merge == "none":
        return lambda num_instances: {}
    if settings.merge == "table" and settings.merge_table is not None:
        table = read_merge_table(settings.merge_table, setting="clean.merge_table")
        return lambda num_instances: table
    if like is not None:
        merges = like.merges
        return lambda num_instances: merges
    lexicon = WordNet(settings.wordnet_dir)
    return lambda num_instances: merge_table(num_instances, lexicon)


def _read_annotations(settings: CleanConfig) -> tuple[list[Instance], list[Reject]]:
    instances: list[Instance] = []
    rejects: list[Reject] = []
    for split, urls in settings.annotations.items():
        for url in urls:
            source = url.rpartition("/")[2]
            records = read_records(url, setting=f"clean.annotations.{split}")
            found, bad = parse_records(records, split=split, source=source)
            logger.info("read %d records of %s from %s", len(records), split, source)
            instances += found
            rejects += bad
    instances, duplicates = drop_duplicates(instances)
    return instances, rejects + duplicates


def _run_steps(
    instances: Sequence[Instance],
    settings: CleanConfig,
    *,
    merge: MergeRule,
    like: Like | None,
    hide: HideRule | None,
) -> Cleaned:
    return clean_instances(
        instances,
        min_side=settings.min_side,
        merge=merge,
        renames=settings.renames,
        deleted_attributes=settings.deleted_attributes,
        known=like.vocabulary if like else None,
        require_positive=settings.require_positive,
        hide=hide,
    )


def _make_vocabulary(cleaned: Cleaned, settings: CleanConfig) -> Vocabulary:
    types, parents = settings.attribute_types, settings.attribute_parent_types
    if settings.head_tail is not None:
        lists = read_name_lists(settings.head_tail, setting="clean.head_tail")
        prevalence = listed_prevalence(cleaned.attributes, lists)
    else:
        train = (i.positive for i in cleaned.instances if i.split == "train")
        num_positive = Counter(name for positive in train for name in positive)
        prevalence = prevalence_by_count(cleaned.attributes, num_positive)
    return Vocabulary(
        objects=cleaned.objects,
        attributes=cleaned.attributes,
        attribute_type=attribute_types(
            cleaned.attributes,
            types=read_name_lists(types, setting="clean.attribute_types") if types else {},
            parent_types=read_name_lists(parents, setting="clean.attribute_parent_types")
            if parents
            else None,
        ),
        prevalence=prevalence,
    )


def _make_feasible(
    tables: Mapping[str, pa.Table], vocabulary: Vocabulary, settings: CleanConfig
) -> FeasibleSets:
    feasible = build_feasible_sets(
        [tables[split] for split in settings.feasible_splits], num_objects=len(vocabulary.objects)
    )
    if settings.feasible_top_k == 0 or settings.object_vectors is None:
        return feasible
    return enlarge(
        feasible,
        path=settings.object_vectors,
        vocabulary=vocabulary,
        top_k=settings.feasible_top_k,
        votes=settings.feasible_votes,
    )


def _check_left(cleaned: Cleaned, *, num_rejected: int) -> None:
    if not cleaned.instances:
        steps = ", ".join(
            f"{step} {values['instances']}" for step, values in cleaned.counts.items()
        )
        raise DataError(
            f"no instance is left (after each step: {steps}; rejected {num_rejected}); check "
            "clean.annotations, clean.min_side and clean.require_positive"
        )


def _compare(counts: StepCounts, settings: CleanConfig) -> Counts:
    """The verdict on `clean.expected` for the summary; nothing when there is none."""
    if not settings.expected:
        return {}
    departure = first_departure(counts, settings.expected)
    if departure is None:
        return {"expected": "met"}
    logger.warning("counts depart from clean.expected, first at %s", departure)
    return {"expected": f"departs at {departure}"}


def _check_rejected(num_rejected: int, num_records: int, config: Config) -> None:
    limit = config.clean.max_rejected
    if num_rejected > limit * num_records:
        raise DataError(
            f"{num_rejected} of {num_records} instances were rejected, more than "
            f"clean.max_rejected {limit:g} allows; all files are written: see rejects.parquet in "
            f"{config.paths.instances}, then repair the annotations into a new root, or raise "
            "clean.max_rejected and repeat"
        )


PROGRAM = Program(
    name="clean",
    usage="python -m shard_tools clean",
    purpose=(
        "Read annotation files, drop small boxes, merge object names, delete attributes, and\n"
        "write instances, vocabulary and feasible sets to paths.instances."
    ),
    sections=("clean", "paths", "observability"),
    flags=("like", "json"),
    output=lambda config, flags: config.paths.instances,
    work=clean,
)
"""`python -m shard_tools clean`."""
