"""`vlal import FORMAT`: annotations in other formats to files that `clean` reads.

Writes the records of each split, the rejects, and a configuration for the other stages. Each format
is a generator, `shard_tools.importers.FORMAT.read_FORMAT`; its module is imported when it is asked
for.
"""

import glob
import importlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from shard_tools.clean.files import json_bytes
from shard_tools.importers.records import (
    WHOLE,
    Input,
    Item,
    RecordWriter,
    list_inputs,
)
from vlal_dist.config.sections import Config, ImportConfig, PathsConfig
from vlal_dist.errors import ConfigError, DataError, bounded
from vlal_dist.program import Counts, Program, make_way, run_one_of, run_program
from vlal_dist.remarks import remark
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.earlier import Owned
from vlal_dist.storage.store import Store, open_store

FORMAT = 1
MANIFEST = "import.json"
CONFIG = "config.yaml"

FORMATS = {
    "table": "CSV, TSV, JSON lines, Parquet, Arrow: a row per object, or per attribute of one",
    "coco": "COCO JSON: attributes by name, by id (Fashionpedia, PACO), as a vector (OVAD)",
    "openimages": "CSV files of Open Images: labels of photos, boxes, relationships",
    "webdataset": "tars of webdataset, such as img2dataset's: photos, and labels in their json",
    "cub": "a folder of CUB-200-2011: attributes of birds with the annotators' certainty",
}
"""Word -> its purpose."""
FOLDERS = ("cub",)
"""Formats whose inputs are folders."""

PURPOSE = """
Read annotations of a format and write, to paths.imported, files that clean reads, rejects.parquet
and config.yaml, with which the other stages run.
"""

logger = logging.getLogger(__name__)


def import_records(word: str, config: Config, flags: Mapping[str, str]) -> Counts:
    """Import `importing.inputs` into the root `paths.imported`; returns the closing counts.

    Raises:
        ConfigError: settings that do not fit the input.
        DataError: an unreadable file, or no usable record.
        StorageError: the root cannot be written.
    """
    settings, target = config.importing, open_store(config.paths.imported)
    limit = _limit(flags)
    inputs = list_inputs(settings, folders=word in FOLDERS)
    for place in settings.photos:
        if not (glob.has_magic(place) or "://" in place or Path(place).exists()):
            raise ConfigError(f"importing.photos {place}: no such folder or file; correct the path")
    target.list_keys(MANIFEST)  # a wrong bucket fails now
    module = importlib.import_module(f"shard_tools.importers.{word}")
    read: Callable[[ImportConfig], Iterator[Item]] = getattr(module, f"read_{word}")
    with tempfile.TemporaryDirectory(prefix="vlal-import-") as folder:
        writer = RecordWriter(Path(folder), rules=list(settings.names), limit=limit)
        with closing(writer), closing(_generator(read(settings))) as items:
            for item in items:
                writer.add(item)
                if writer.full:
                    break
        counts = writer.counts
        if not any(counts["records"].values()):
            raise DataError(_nothing(writer, inputs, target))
        make_way(program_of(word), config, flags)
        _commit(word, config, writer, inputs, target, limit=limit)
    if writer.reasons:
        remark(
            logger,
            "import.rejected",
            "%d rejected (%s); all are in %s/rejects.parquet",
            sum(writer.reasons.values()),
            rejects_summary(writer),
            target.url,
        )
    clip = "" if config.scoring.weights else " --scoring.weights openai"
    sys.stdout.write(
        f"next: vlal run --config {config.paths.imported.rstrip('/')}/{CONFIG}{clip}\n"
        "      or, without CLIP: --method.draw_weights cooccurrence --data.likelihood scores; "
        "--to pack: a look at the data first\n"
    )
    return {
        "files": len(inputs),
        "records": counts["records"],
        **counts["labels"],
        "rejected": sum(writer.reasons.values()),
    }


def rejects_summary(writer: RecordWriter) -> str:
    """The commonest reasons, each with its number and an example."""
    return "; ".join(
        f"{count} {reason}, such as {bounded(one.file, most=80)}"
        f"{f' line {one.line}' if one.line else ''}: {bounded(one.detail, most=120)}"
        for reason, count in writer.reasons.most_common(3)
        for one in [writer.examples[reason]]
    )


def _generator(items: Iterator[Item]) -> Any:
    """The items; a generator, so that it can be closed, which removes its temporary files."""
    yield from items


def _limit(flags: Mapping[str, str]) -> int:
    text = flags.get("limit", "0")
    if (
        not text.isascii()
        or not text.isdigit()
        or len(text) > 12
        or ("limit" in flags and not int(text))
    ):
        raise ConfigError(f"--limit {bounded(text)}: give a number of photos above 0")
    return int(text)


def _nothing(writer: RecordWriter, inputs: Sequence[Input], target: Store) -> str:
    """The message where no record is left, whose rejects are not written."""
    files = bounded(", ".join(one.url for one in inputs))
    if not writer.reasons:
        return f"{files}: no record; give files that hold annotations: importing.inputs"
    return (
        f"{files}: no usable record, {sum(writer.reasons.values())} rejected "
        f"({rejects_summary(writer)}); correct the files, or the settings of section importing"
    )


def _commit(
    word: str,
    config: Config,
    writer: RecordWriter,
    inputs: Sequence[Input],
    target: Store,
    *,
    limit: int,
) -> None:
    """Write the files, then `import.json` with the sha256 of each; create-only."""
    text = config_text(word, config, writer, inputs).encode()
    files: dict[str, bytes | Path] = {**writer.files, CONFIG: text}
    settings = config.importing.model_dump(mode="json")
    manifest = {
        "format": FORMAT,
        "source": word,
        "inputs": [
            {"split": one.split, "file": one.url, "bytes": one.size_bytes} for one in inputs
        ],
        "settings": settings | ({"limit": limit} if limit else {}),
        **writer.facts,
        **writer.counts,
        "files": {key: sha256_of(data) for key, data in files.items()},
    }
    end = json_bytes(manifest)
    if target.exists(MANIFEST):  # a finished root of another import is refused before a new split
        target.create(MANIFEST, end)
    created = [target.create(key, data) for key, data in {**files, MANIFEST: end}.items()]
    if not any(created):
        logger.info("%s already holds exactly these files", target.url)


def config_text(word: str, config: Config, writer: RecordWriter, inputs: Sequence[Input]) -> str:
    """`config.yaml` of the imported root: what follows from the input, with remarks."""
    records = writer.counts["records"]
    root = config.paths.imported.rstrip("/")
    sections: dict[str, dict[str, object]] = {
        "paths": {"root": config.paths.root},
        "clean": {
            "annotations": {split: [f"{root}/{split}.parquet"] for split in _ordered(records)},
            "merge": "none",
            "min_side": 0,
            "require_positive": False,
        },
        "pack": {"images": config.importing.photos},
    }
    if config.paths.imported != PathsConfig(root=config.paths.root).imported:
        sections["paths"]["imported"] = config.paths.imported
    if "all" in records:
        sections["clean"]["split"] = config.importing.split
    if "train" not in records and "all" not in records:
        sections["clean"]["feasible_splits"] = _ordered(records)[:1]
    if set(writer.objects) == {WHOLE}:
        sections["model"] = {"object_gate": False}
    if not writer.labels["negative"]:
        sections["evaluation"] = {"unannotated": "negative"}
    if config.scoring.weights is not None:
        sections["scoring"] = {"weights": config.scoring.weights}
    for key, value in writer.settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    if not sections["pack"]["images"]:
        folders = [one.url.rpartition("/")[0] or "." for one in inputs]
        sections["pack"]["images"] = list(dict.fromkeys(folders))
    lines = [
        f"# Written by `vlal import {word}`. Settings of your own go into another file, which",
        f"# starts with `base: {root}/{CONFIG}`, or into flags.",
    ]
    for section, keys in sections.items():
        lines += ["", f"{section}:"]
        for name, value in keys.items():
            remark = _REMARKS.get(f"{section}.{name}", "")
            line = f"  {name}: {json.dumps(value, ensure_ascii=False)}"
            lines.append(f"{line}   # {remark}" if remark else line)
    if "weights" not in sections.get("scoring", {}):
        lines += [
            "",
            "# scoring: {weights: openai}   # downloads CLIP; or a local .safetensors file;",
            "# or without CLIP: method: {draw_weights: cooccurrence}, data: {likelihood: scores}",
        ]
    return "\n".join(lines) + "\n"


_REMARKS = {
    "clean.merge": "object names stay as they are; wordnet: merge synonyms",
    "clean.min_side": "pixels; boxes with a shorter side are dropped",
    "clean.require_positive": "objects without a positive attribute are kept",
    "clean.split": "per cent of the photos for train/val/test",
    "pack.images": "folders, zips, tars, s3:// with the photos, searched in order",
    "pack.in_place": "false: pack copies of the photos into tars of its own",
    "data.likelihood": "the tars stay as they are, so that merge has no place for likelihoods",
    "model.object_gate": "whole photos, without names of objects",
    "evaluation.unannotated": "no attribute is annotated as absent",
}


def _ordered(records: Mapping[str, int]) -> list[str]:
    return [split for split in ("train", "val", "test", "all") if split in records]


def program_of(word: str) -> Program:
    """The program of a format."""
    return Program(
        name="import",
        usage=f"vlal import {word}",
        purpose=PURPOSE,
        sections=("importing", "paths", "observability"),
        output=lambda config, flags: config.paths.imported,
        work=partial(import_records, word),
        flags=("limit", "replace", "json"),
        owned=Owned(
            r"import\.json|config\.yaml|(train|val|test|all|rejects)\.parquet", last=MANIFEST
        ),
    )


def main(argv: Sequence[str]) -> int:
    """Run the import that the first word names, and return its exit code."""
    return run_one_of(
        FORMATS,
        lambda word, rest: run_program(program_of(word), rest),
        argv,
        command="vlal import",
        kind="format",
    )
