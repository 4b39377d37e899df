"""`vlal clean`: annotation files to instances, vocabulary and feasible sets.

Sections 3.1 and 2.2 of the paper. Everything is checked and computed before the first file is
written; the files are create-only and depend on the input alone, so the command can be repeated
after any interruption.
"""

import logging
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shard_tools.clean.columns import SPLITS, Rows
from shard_tools.clean.counts import (
    HIDE_QUANTITIES,
    StepCounts,
    check_expected,
    first_departure,
    remark_on_losses,
    say_labels,
)
from shard_tools.clean.files import (
    MANIFEST,
    RejectFile,
    check_merge_table,
    json_bytes,
    read_merge_table,
    write_rejects,
    write_root,
)
from shard_tools.clean.names import (
    check_deleted,
    check_table,
    listed,
    warn_of_alike_names,
    warn_of_unused_names,
)
from shard_tools.clean.reading import UNDIVIDED, Division, read_annotations
from shard_tools.clean.steps import Cleaned, clean_rows
from shard_tools.clean.vocabulary import make_feasible, make_vocabulary
from shard_tools.clean.wordnet import WordNet
from vlal_dist.config.sections import CleanConfig, Config
from vlal_dist.contents import parse_json
from vlal_dist.errors import ConfigError, DataError, NotFoundError, bounded
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.pipeline import clean_inputs
from vlal_dist.program import Counts, Program, make_way
from vlal_dist.remarks import remark
from vlal_dist.storage.checks import translated_errors
from vlal_dist.storage.earlier import Owned
from vlal_dist.storage.store import open_store
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def clean(config: Config, flags: Mapping[str, str]) -> Counts:
    """Clean the annotations of `config.clean` into the root `config.paths.instances`.

    Raises:
        ConfigError: settings that contradict each other, or WordNet is absent.
        DataError: unreadable annotations, conflicting ids, or (after all is written) more rejects
            than `clean.max_rejected`.
        StorageError: the root cannot be written.
    """
    settings, target = config.clean, open_store(config.paths.instances)
    known, known_feasible, known_merges = (
        open_like(flags["like"], settings) if "like" in flags else (None, None, None)
    )
    splits = _check_settings(settings, like=known is not None)
    merge = _merge_rule(settings, known_merges)
    target.list_keys("clean.json")  # a wrong bucket fails now
    with tempfile.TemporaryDirectory(prefix="vlal-clean-") as name, translated_errors(Path(name)):
        folder = Path(name)
        rows, rejects = Rows(folder / "rows"), RejectFile(folder / "rejects.parquet")
        num_records = read_annotations(settings, rows, rejects, folder)
        objects, attributes = set(rows.objects.number), set(rows.attributes.number)
        if len(rows):
            check_deleted(settings.deleted_attributes, attributes, strict=known is None)
        cleaned = clean_rows(
            rows, settings, splits=splits, merge=merge, known=known, rejects=rejects, folder=folder
        )
        rejects.close()
        if not cleaned.tally.instances.any():
            raise DataError(_nothing_left(cleaned, rejects, where=write_rejects(target, rejects)))
        _warn_of_names(objects, cleaned, settings, merge if settings.merge == "table" else {})
        vocabulary = known or make_vocabulary(cleaned, settings, annotated=attributes)
        feasible = known_feasible or make_feasible(cleaned.tally, vocabulary, settings)
        counts = {**cleaned.counts, "feasible": {"pairs": len(feasible.indices)}}
        rule = _hide_rule(settings)
        division = {"split": settings.split, "split_seed": settings.split_seed}
        sizes = cleaned.tally.instances.sum(axis=1).tolist()
        manifest: dict[str, Any] = {
            "vocabulary_digest": vocabulary.digest,
            "feasible_digest": feasible.digest,
            "records": num_records,
            "splits": {split: sizes[SPLITS.index(split)] for split in splits},
            "rejected": rejects.num_rows,
            "clashes": cleaned.clashes,
            "counts": counts,
            **rule,
            **(division if settings.split is not None else {}),
        }
        names = {**vocabulary.to_json(), "merges": cleaned.merges, "counts": counts, **rule}
        files: dict[str, bytes | Path] = {
            "vocabulary.json": json_bytes(names),
            "feasible.npz": feasible.to_npz(),
            **{f"{split}.parquet": path for split, path in cleaned.tables.items()},
            "rejects.parquet": rejects.path,
            **cleaned.hidden,
        }
        make_way(PROGRAM, config, flags)
        write_root(target, files, manifest)
    remark_on_losses(cleaned.counts)
    say_labels(cleaned.tally, splits)
    unknown = rejects.count("unknown_object", "unknown_attribute")
    _check_rejected(rejects, unknown, settings, records=num_records, root=target.url)
    return {
        "records": num_records,
        "instances": sum(sizes),
        "splits": manifest["splits"],
        "objects": len(vocabulary.objects),
        "attributes": len(vocabulary.attributes),
        "feasible_pairs": len(feasible.indices),
        "clashes": cleaned.clashes,
        "rejected": rejects.num_rows,
        **({"unknown_names": unknown} if known else {}),
        **{name: counts["hide"][name] for name in HIDE_QUANTITIES if rule},
        **_compare(counts, settings),
    }


def _check_rejected(
    rejects: RejectFile, unknown: int, settings: CleanConfig, *, records: int, root: str
) -> None:
    """Say how many instances have names that the dataset of `--like` lacks; limit the rejects.

    Args:
        rejects: all of them.
        unknown: those of such names.
        settings: with the limits.
        records: number of records.
        root: where the files are.

    Raises:
        DataError: above `clean.max_rejected`, or `clean.max_unknown`.
    """
    for key, number in (("max_rejected", rejects.num_rows - unknown), ("max_unknown", unknown)):
        if number > getattr(settings, key) * records:
            raise DataError(
                f"{number} of {records} instances were rejected, more than clean.{key} "
                f"{getattr(settings, key):g} allows ({rejects.summary()}); all files are written: "
                f"see rejects.parquet in {root}, then repair the annotations and repeat with "
                f"--replace, or raise clean.{key} and repeat"
            )
    if unknown:
        remark(
            logger,
            "clean.max_unknown",
            "%d of %d instances are left out, as the dataset of --like lacks their object or an "
            "attribute (%s); all are in %s/rejects.parquet; clean.renames gives objects its names",
            unknown,
            records,
            rejects.summary(),
            root,
        )


def _merge_rule(
    settings: CleanConfig, known: Mapping[str, str] | None
) -> Mapping[str, str] | WordNet:
    """Name -> representative, or the dictionary that decides which names are similar."""
    if settings.merge == "none":
        return {}
    if settings.merge == "table" and settings.merge_table is not None:
        return read_merge_table(settings.merge_table, setting="clean.merge_table")
    if known is not None:  # the same names again, not a new merge
        return known
    return WordNet(settings.wordnet_dir)


def open_like(url: str, settings: CleanConfig) -> tuple[Vocabulary, FeasibleSets, dict[str, str]]:
    """Names, feasible sets and merge table of an earlier dataset, which `--like` takes over.

    Args:
        url: instances or dataset root.
        settings: of the present cleaning.

    Raises:
        ConfigError: labels are to be hidden, and the root's own were not hidden in the same way:
            its feasible sets would disclose them.
        DataError: no such root, or files that are damaged or do not belong together.
        StorageError: the root cannot be read.
    """
    store = open_store(url)
    try:
        data, sets = store.read("vocabulary.json"), store.read("feasible.npz")
    except NotFoundError as error:
        raise DataError(
            f"--like {url}: {error}; give the root that clean, pack or merge wrote"
        ) from None
    where, remedy = f"--like {url}: vocabulary.json", "write that root again"
    values = parse_json(data, dict[str, Any], where=where, remedy=remedy)
    try:
        feasible = FeasibleSets.from_npz(sets)
    except ValueError as error:
        raise DataError(f"--like {url} cannot be read: {error}; {remedy}") from None
    vocabulary = Vocabulary.from_json(values)
    if feasible.num_objects != len(vocabulary.objects):
        raise DataError(
            f"--like {url}: feasible sets of {feasible.num_objects} objects, names of "
            f"{len(vocabulary.objects)}; the files do not belong together: write that root again"
        )
    if any(values.get(key) != value for key, value in _hide_rule(settings).items()):
        theirs = str(values.get("hide", "none"))
        theirs += f" with seed {values['hide_seed']}" if "hide_seed" in values else ""
        raise ConfigError(
            f"--like {url} was cleaned with clean.hide {bounded(theirs)}, this is clean.hide "
            f"{settings.hide} with seed {settings.hide_seed}: its feasible sets may "
            "come from labels that are hidden here; give a root cleaned with the same clean.hide "
            "and clean.hide_seed, or set clean.hide none"
        )
    merges = check_merge_table(values.get("merges", {}), what=f"--like {url}: merges")
    return vocabulary, feasible, merges


def _hide_rule(settings: CleanConfig) -> dict[str, object]:
    """Entries of `vocabulary.json` and `clean.json`: every digest after them covers the rule."""
    if settings.hide == "none":
        return {}
    return {"hide": settings.hide, "hide_seed": settings.hide_seed}


def _check_settings(settings: CleanConfig, *, like: bool) -> list[str]:
    """Refuse settings that contradict each other; the splits that will be written."""
    if not settings.annotations:
        raise ConfigError(
            "clean.annotations is empty; give the annotation files of each split, for example "
            "--clean.annotations '{train: [train.json], val: [val.json], test: [test.json]}'"
        )
    splits = list(settings.annotations)
    unknown = [split for split in splits if split not in SPLITS]
    if settings.split is not None:
        if splits != [UNDIVIDED]:
            raise ConfigError(
                f"clean.split divides undivided photos, but clean.annotations has {splits}; give "
                f"all files as one list, {{{UNDIVIDED}: [...]}}, or leave clean.split out"
            )
        splits = Division(settings.split, settings.split_seed).splits
    elif unknown == [UNDIVIDED]:
        raise ConfigError(
            "clean.annotations has undivided photos (all), which clean.split must divide; give "
            "--clean.split 80/10/10 (train, val and test in per cent)"
        )
    elif unknown:
        raise ConfigError(
            f"clean.annotations has the split {unknown[0]!r}; splits are {', '.join(SPLITS)}"
        )
    for split, urls in settings.annotations.items():
        if not urls:
            raise ConfigError(
                f"clean.annotations.{split} names no file; give one, or remove the split"
            )
    check_table(settings.renames, what="clean.renames", error=ConfigError)
    if settings.attribute_parent_types is not None and settings.attribute_types is None:
        raise ConfigError(
            "clean.attribute_parent_types groups the types of clean.attribute_types, which is not "
            "set; give both, or the types alone"
        )
    for name, used, why in (
        ("merge_table", settings.merge == "table", f"clean.merge is {settings.merge}, not table"),
        ("object_vectors", settings.feasible_top_k > 0, "clean.feasible_top_k is 0"),
    ):
        if getattr(settings, name) is not None and not used:
            remark(logger, f"clean.{name}", "clean.%s is not read: %s", name, why)
    if settings.merge == "table" and settings.merge_table is None:
        raise ConfigError(
            "clean.merge is table, but clean.merge_table is not set; give a JSON of name -> "
            "representative, or the vocabulary.json of an earlier clean"
        )
    check_expected(settings.expected)
    if like:
        return splits
    absent = [split for split in settings.feasible_splits if split not in splits]
    if absent or not settings.feasible_splits:
        raise ConfigError(
            f"clean.feasible_splits is {settings.feasible_splits}, clean.annotations has "
            f"{splits}; name splits that are there, or use --like DATASET to "
            "take the feasible sets of an earlier dataset"
        )
    if settings.feasible_top_k > 0 and settings.object_vectors is None:
        raise ConfigError(
            f"clean.feasible_top_k is {settings.feasible_top_k}, which needs "
            "clean.object_vectors: CLIP text vectors of the object names. Run this command first "
            "with --clean.feasible_top_k 0 and another --paths.instances NAMES, then `vlal score "
            "--object-vectors FILE --paths.instances NAMES`, then this one with "
            " --clean.object_vectors FILE"
        )
    return splits


def _warn_of_names(
    objects: Collection[str],
    cleaned: Cleaned,
    settings: CleanConfig,
    table: Mapping[str, str] | WordNet,
) -> None:
    """Log names of the settings that match nothing, and names that differ in spelling alone."""
    warn_of_unused_names(
        table if isinstance(table, Mapping) else (),
        objects,
        setting="clean.merge_table",
        kind="object of the annotations",
        follows="they merge nothing",
    )
    merged = {cleaned.merges.get(name, name) for name in objects}
    for name in settings.renames:
        if name in objects and name not in merged:
            logger.warning(
                "clean.renames: %s was merged into %s before, and is renamed no more; rename that",
                listed([name]),
                listed([cleaned.merges[name]]),
            )
    warn_of_unused_names(
        [name for name in settings.renames if name not in objects],
        merged,
        setting="clean.renames",
        kind="object of the annotations",
        follows="they rename nothing",
    )
    warn_of_alike_names(cleaned.objects, kind="object")
    warn_of_alike_names(cleaned.attributes, kind="attribute")


def _nothing_left(cleaned: Cleaned, rejects: RejectFile, *, where: str) -> str:
    """The message where no instance is left: the step that took the last ones, and its setting."""
    steps = {name: found["instances"] for name, found in cleaned.counts.items()}
    last = next((name for name, count in steps.items() if count == 0), "hide")
    remedy = {
        "read": "correct the records, or clean.annotations",
        "min_side": "lower clean.min_side",
        "known_names": "give annotations with the names of the dataset of --like",
        "require_positive": "set clean.require_positive false, or annotate positives",
    }.get(last, "check clean.annotations")
    shown = ", ".join(f"{name} {count}" for name, count in steps.items())
    why = f"; rejected {rejects.num_rows}: {rejects.summary()}; {where}" if rejects.num_rows else ""
    return f"no instance is left (after each step: {shown}{why}); {remedy}"


def _compare(counts: StepCounts, settings: CleanConfig) -> Counts:
    """The verdict on `clean.expected` for the summary; nothing when there is none."""
    if not settings.expected:
        return {}
    departure = first_departure(counts, settings.expected)
    if departure is None:
        return {"expected": "met"}
    key = "clean.expected"
    remark(logger, key, "counts depart from clean.expected, first at %s", departure)
    return {"expected": f"departs at {departure}"}


PROGRAM = Program(
    name="clean",
    usage="vlal clean",
    purpose=(
        "Read annotation files, drop small boxes, merge object names, delete attributes, and\n"
        "write instances, vocabulary and feasible sets to paths.instances."
    ),
    sections=("clean", "paths", "observability"),
    flags=("like", "replace", "json"),
    output=lambda config, flags: config.paths.instances,
    work=clean,
    inputs=clean_inputs,
    owned=Owned(
        r"(clean|vocabulary)\.json|feasible\.npz|(train|val|test|rejects|hidden)\.parquet",
        last=MANIFEST,
    ),
)
"""`vlal clean`."""
