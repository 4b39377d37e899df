"""Stages of `vlal run`: what each one reads, and whether its last result still holds.

The inputs of a program are the settings that decide what it writes and the digests of the files it
reads. `run_program` records them in `NAME.result.json`; `vlal run` compares them with the present
ones, as make compares times. Imports neither torch nor numpy.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlal_dist.config.load import known_fields
from vlal_dist.config.sections import Config, evaluation_folder
from vlal_dist.contents import parse_json, parse_yaml
from vlal_dist.errors import ConfigError, DataError, NotFoundError
from vlal_dist.storage.checks import sha256_of
from vlal_dist.storage.store import find_files, open_store

Inputs = dict[str, Any]
"""`section.key` -> its value, or the digest of its file; `paths.ROOT/KEY` -> digest of that file,
None where it is absent. JSON values only."""
Flags = Mapping[str, str]

NOT_DECISIVE = frozenset(
    {
        # where and how fast a stage works; at most the last bits depend on it
        "pack.workers",
        "scoring.batch_size",
        "scoring.decode_threads",
        "scoring.compile",
        "scoring.actors",
        "scoring.gpus_per_actor",
        "scoring.cpus_per_actor",
        "scoring.device",
        "scoring.use_ray",
        "scoring.max_retries",
        "data.threads",
        "data.prefetch_steps",
        "data.cache_bytes",
        "data.decoded_bytes",
        "training.threads",
        # what is kept or logged besides the result
        "training.log_steps",
        "training.checkpoint_epochs",
        "training.checkpoint_steps",
        "training.keep_checkpoints",
        "training.peer_timeout_s",
        # limits at which a stage gives up; a finished one has kept them
        "scoring.max_quarantined",
        "data.max_quarantined",
        # the merge accepts one version of WordNet alone, wherever it is installed
        "clean.wordnet_dir",
    }
)
"""Settings that do not make a finished stage run again. Whole sections that no stage's inputs
name (`observability`, `supervise`), and `paths.cache`, do not either."""

FILES = frozenset(
    {
        "clean.annotations",
        "clean.attribute_types",
        "clean.attribute_parent_types",
        "clean.head_tail",
        "clean.merge_table",
        "clean.object_vectors",
        "pack.images",
        "scoring.model_config_dir",
        "scoring.weights",
        "data.subset",
        "method.psl_prior",
        "model.weights",
        "evaluation.truth",
        "evaluation.compare",
    }
)
"""Settings that name files: their content counts, not their path."""

LARGE = 256 << 20
"""Bytes above which a file counts by size and time of change: hashing takes a second per GB, and a
run with nothing left to do should end in a second."""


def clean_inputs(config: Config, flags: Flags) -> Inputs:
    """Annotation files and rules."""
    like = {"--like": flags["like"]} if "like" in flags else {}
    return {**_settings(config, "clean"), **like}


def pack_inputs(config: Config, flags: Flags) -> Inputs:
    """What clean wrote, and the photos (see `_photos`)."""
    return {**_settings(config, "pack"), **_digests(config, "instances/clean.json")}


def score_inputs(config: Config, flags: Flags) -> Inputs:
    """The dataset, the model, the prompts."""
    read = _digests(config, "dataset/dataset.json")
    if (root := config.scoring.embeddings) is not None:
        read["scoring.embeddings/scores.json"] = _digest(root, "scores.json")
    return {**_settings(config, "scoring"), **read}


def merge_inputs(config: Config, flags: Flags) -> Inputs:
    """Dataset, scores, temperature."""
    settings = _settings(config, "scoring.temperature", "pack.block_bytes")
    return {**settings, **_digests(config, "dataset/dataset.json", "scores/scores.json")}


def train_inputs(config: Config, flags: Flags) -> Inputs:
    """Data and everything that decides what is learned.

    Of section `evaluation` what unannotated pairs count as: the best model is selected by mAP.
    """
    read = ["merged/dataset.json"]
    if config.data.likelihood == "scores":
        read = ["dataset/dataset.json", *(["scores/scores.json"] if draws_by_clip(config) else [])]
    mixed = {f"data.mix/{root}": _digest(root, "dataset.json") for root in config.data.mix}
    return {**_train_settings(config), **mixed, **_digests(config, *read)}


def evaluate_inputs(config: Config, flags: Flags) -> Inputs:
    """One split and predictor."""
    names = ("split", "predictor", "unannotated", "batch_size", "top_k", "threshold", "truth")
    read = {"model": ["run/best/model.json"], "clip": ["scores/scores.json"], "constant": []}
    return {
        **_settings(config, *(f"evaluation.{name}" for name in names)),
        **_digests(config, "dataset/dataset.json", *read[config.evaluation.predictor]),
    }


def report_inputs(config: Config, flags: Flags) -> Inputs:
    """Training's end, the evaluations of the split, the merged dataset."""
    split = config.evaluation.split
    results = (
        f"run/{evaluation_folder(split, predictor)}/result.json"
        for predictor in ("model", "constant", "clip")
    )
    merged = ["merged/dataset.json"] if config.data.likelihood == "tar" else []
    roots = ("dataset/dataset.json", *merged, "run/train.result.json")
    others = open_store(config.paths.run).list_keys("evaluation/")
    beside = (f"run/{key}" for key in others if "@" in key and key.endswith("/result.json"))
    read = _digests(config, *roots, *results, *sorted(beside))
    if (root := config.evaluation.experiments) is not None:
        keys = [f"{table}/{table}.json" for table in ("table1", "table2", "ablations")]
        read |= {f"evaluation.experiments/{key}": _digest(root, key) for key in keys}
    return {**_settings(config, "evaluation", "training.seed"), **read}


def export_inputs(config: Config, flags: Flags) -> Inputs:
    """The best model and its evaluations on the validation and the evaluated split."""
    splits = (config.data.validation_split, config.evaluation.split)
    names = ("export", "data.validation_split", "evaluation.split", "paths.export")
    results = (f"run/{evaluation_folder(split, 'model')}/result.json" for split in splits)
    roots = ("dataset/dataset.json", "run/best/model.json")
    return {**_settings(config, *names), **_digests(config, *roots, *results)}


def draws_by_clip(config: Config) -> bool:
    """Whether the loss draws its ignore sets by CLIP likelihoods (training.data.open_data)."""
    loss = config.method
    drawn = loss.loss == "selective" and loss.num_ignore not in (0, "all")
    return drawn and loss.draw_weights == "likelihood"


@dataclass(frozen=True)
class Stage:
    """One command of `vlal run`.

    Attributes:
        title: its name in the plan, such as `evaluate test`.
        command: word after `vlal`.
        config: the configuration it runs with.
        words: settings and flags added to the command line.
        inputs: of this command.
        record: root, and key of the result that it writes there when it has finished.
        output: root and key of a file that is there when it has finished.
        after: titles of the stages whose output it reads.
    """

    title: str
    command: str
    config: Config
    words: tuple[str, ...]
    inputs: Callable[[Config, Flags], Inputs]
    record: tuple[str, str]
    output: tuple[str, str]
    after: tuple[str, ...]


STAGES = ("clean", "pack", "score", "merge", "train", "evaluate", "report", "export")
"""Commands of `vlal run`, in order."""


RETRY = "--retry-rejected"
"""Flag of the stages `RETRYING`: pack what was rejected, and renew what that changes."""
RETRYING = ("pack", "score", "merge")
REPLACE = "--replace"
"""Flag of the stages `REPLACING`: remove their earlier output; training then starts over."""
REPLACING = ("clean", "pack", "score", "merge", "train")


def stages_of(
    config: Config, *, retry_rejected: bool = False, replace: bool = False
) -> list[Stage]:
    """The stages that a configuration needs, in order.

    merge is needed where training reads tars (`data.likelihood tar`), which also hold what losses
    without likelihoods read, unless `paths.merged` is `paths.dataset`; score where merge is, where
    training draws by score files, and for the zero-shot predictor. The model is evaluated on the
    validation split (the export's thresholds) and on `evaluation.split`, there also the constant.

    Args:
        config: the configuration.
        retry_rejected: pack runs in any case, and the stages `RETRYING` with that flag.
        replace: the stages `REPLACING` write their output again where another one is in the way.

    Raises:
        ConfigError: likelihoods are to be merged into tars that are packed in place.
    """
    if config.pack.in_place and config.data.likelihood == "tar":
        raise ConfigError(
            "pack.in_place leaves tars as they are, so that likelihoods cannot be merged into them "
            "(data.likelihood tar); set data.likelihood scores, or pack.in_place false"
        )
    paths, evaluation = config.paths, config.evaluation
    merged = config.data.likelihood == "tar" and paths.merged != paths.dataset
    scored = merged or evaluation.predictor == "clip"
    if config.data.likelihood == "scores" and draws_by_clip(config):
        scored = True

    def stage(
        name: str, inputs: Callable[[Config, Flags], Inputs], root: str, output: str, *after: str
    ) -> Stage:
        record = (root, "score_clip.result.json" if name == "score" else f"{name}.result.json")
        where = paths.export if name == "export" else root
        words: tuple[str, ...] = (RETRY,) if retry_rejected and name in RETRYING else ()
        words += (REPLACE,) if replace and name in REPLACING else ()
        return Stage(name, name, config, words, inputs, record, (where, output), after)

    found = [
        stage("clean", clean_inputs, paths.instances, "clean.json"),
        stage("pack", pack_inputs, paths.dataset, "dataset.json", "clean"),
    ]
    if scored:
        found.append(stage("score", score_inputs, paths.scores, "scores.json", "pack"))
    if merged:
        found.append(stage("merge", merge_inputs, paths.merged, "dataset.json", "pack", "score"))
    data = ("pack", "score", "merge")
    found.append(stage("train", train_inputs, paths.run, "best/model.json", *data))
    evaluations = dict.fromkeys(
        [
            (config.data.validation_split, "model"),
            (evaluation.split, "model"),
            (evaluation.split, "constant"),
            (evaluation.split, evaluation.predictor),
        ]
    )
    evaluated = [_evaluation(config, split, predictor) for split, predictor in evaluations]
    every = [one.title for one in evaluated]
    model = [one.title for one in evaluated if one.config.evaluation.predictor == "model"]
    return [
        *found,
        *evaluated,
        stage("report", report_inputs, paths.run, "report.html", "merge", "train", *every),
        stage("export", export_inputs, paths.run, "config.json", "train", *model),
    ]


def _evaluation(config: Config, split: str, predictor: str) -> Stage:
    own = config.evaluation.model_copy(update={"split": split, "predictor": predictor})
    folder = evaluation_folder(split, predictor)
    return Stage(
        title=f"evaluate {split}" + ("" if predictor == "model" else f" {predictor}"),
        command="evaluate",
        config=config.model_copy(update={"evaluation": own}),
        words=("--evaluation.split", split, "--evaluation.predictor", predictor),
        inputs=evaluate_inputs,
        record=(config.paths.run, f"{folder}/evaluate.result.json"),
        output=(config.paths.run, f"{folder}/result.json"),
        after=("pack", {"model": "train", "clip": "score"}.get(predictor, "pack")),
    )


@dataclass(frozen=True)
class Decision:
    """What is to be done with a stage, and why.

    Attributes:
        action: `maybe`: it has finished, but a stage before it will run; `stop`: training would
            continue a run of other settings; `redo`: so it starts over.
        why: one line.
    """

    action: Literal["run", "skip", "maybe", "stop", "redo"]
    why: str


def decide(stage: Stage, *, running: Collection[str] = ()) -> Decision:
    """Whether a stage has to run.

    Args:
        stage: one of `stages_of`.
        running: titles of stages that will run before it (a plan's).

    Raises:
        StorageError: a root or a file cannot be read.
    """
    record, now = read_json(*stage.record), stage.inputs(stage.config, {})
    waits = [title for title in stage.after if title in running]
    if stage.command == "train" and (earlier := _trained_inputs(stage.config, record, now)):
        changes = changed(earlier, now)
        if changes and not _continues(earlier, now, changes):
            action: Literal["redo", "stop"] = "redo" if REPLACE in stage.words else "stop"
            return Decision(action, f"changed: {_named(changes, earlier, now, stage.config)}")
    if record.get("code") != 0:
        reason = f"last time: {record['reason']}" if record.get("reason") else "no result yet"
        return Decision("run", reason)
    if not open_store(stage.output[0]).exists(stage.output[1]):
        return Decision("run", f"{'/'.join(stage.output)} is not there")
    if "inputs" not in record:
        return Decision("run", "finished, but by a version that did not record its inputs")
    retried = RETRY in stage.words
    if changes := changed(record["inputs"], now):
        why = f"changed: {_named(changes, record['inputs'], now, stage.config)}"
        rejected = record.get("counts", {}).get("rejected", 0)
        if "pack.images" in changes and rejected and not retried:
            why += f"; {rejected} rejected instances stay so without {RETRY}"
        return Decision("run", why)
    if retried and stage.command == "pack":
        return Decision("run", f"{RETRY}: rejected instances are tried again")
    if waits:
        return Decision("maybe", f"finished; to be seen after {', '.join(waits)}")
    return Decision("skip", "finished")


def plan(stages: Sequence[Stage]) -> list[Decision]:
    """The decisions on stages in order, before any of them runs."""
    decisions: list[Decision] = []
    running: list[str] = []
    for stage in stages:
        decisions.append(decide(stage, running=running))
        if decisions[-1].action != "skip":
            running.append(stage.title)
    return decisions


def plan_table(stages: Sequence[Stage], decisions: Sequence[Decision]) -> str:
    """The table of `--plan`."""
    width = max(len(stage.title) for stage in stages)
    rows = [
        f"{stage.title:<{width}}  {decision.action:<5}  {decision.why}"
        for stage, decision in zip(stages, decisions, strict=True)
    ]
    return "\n".join(rows)


def stage_remarks(stages: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    """Title of each stage that remarked something when it last ran, and its remarks (remarks.py).

    The import below `paths.imported` counts as a stage. What several stages remark alike is listed
    with the first of them.
    """
    imported = {stage.config.paths.imported: None for stage in stages}
    records = [("import", (root, "import.result.json")) for root in imported]
    records += [(stage.title, stage.record) for stage in stages]
    seen: set[str] = set()
    found = []
    for title, record in records:
        kept = read_json(*record).get("warnings")
        given = [
            one.get("text")
            for one in (kept if isinstance(kept, list) else [])
            if isinstance(one, dict)
        ]
        texts = [text for text in given if isinstance(text, str) and text not in seen]
        new = list(dict.fromkeys(texts))
        seen.update(new)
        if new:
            found.append((title, new))
    return found


def changed(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of inputs that differ.

    A setting that the record lacks counts with its default: it is newer than the record. One that
    exists no longer does not count.
    """
    fields = known_fields()

    def value(inputs: Mapping[str, Any], name: str) -> Any:
        if name in inputs or name not in fields:
            return inputs.get(name)
        return fields[name].get_default(call_default_factory=True)

    return [
        name
        for name in dict.fromkeys([*now, *recorded])
        if value(recorded, name) != value(now, name)
        and (name in now or "/" in name or name.startswith("--"))
    ]


def _continues(recorded: Mapping[str, Any], now: Mapping[str, Any], changes: list[str]) -> bool:
    """Whether training goes on to a later end as if it had been meant so from the beginning.

    Not where the learning rate follows the end (cosine).
    """

    def later(name: str) -> bool:
        old, new = recorded.get(name), now[name]
        return new is None or (old is not None and new > old)

    lengths = ("training.epochs", "training.max_steps")
    return now["training.schedule"] != "cosine" and all(
        name in lengths and later(name) for name in changes
    )


def _trained_inputs(config: Config, record: Mapping[str, Any], now: Inputs) -> Inputs:
    """Inputs of the run whose checkpoints lie in paths.run; empty without any.

    Of a run that has not finished, its settings: train writes them when it starts, after it has
    removed checkpoints (`--resume none`). Its files are taken as those of now: the data is checked
    when it resumes.
    """
    if record.get("code") == 0 and "inputs" in record:
        inputs: Inputs = record["inputs"]
        return inputs
    store = open_store(config.paths.run)
    try:
        if not store.list_keys("checkpoints/"):
            return {}
        text = store.read("config.yaml").decode()
        started = Config.model_validate(parse_yaml(text, where="config.yaml"))
    except (NotFoundError, ValueError):
        return {}  # of an older version, or damaged
    return {**now, **_train_settings(started)}


def shared_settings(config: Config) -> Inputs:
    """Settings of training that must be equal on all ranks, files among them by content.

    The paths of `data.mix` may differ between machines, and the weights of rank 0 win.
    """
    found = _train_settings(config)
    return {k: v for k, v in found.items() if k not in ("data.mix", "model.weights")}


def _train_settings(config: Config) -> Inputs:
    names = ("data", "method", "model", "training", "scoring.temperature")
    return _settings(config, *names, "evaluation.unannotated")


def _settings(config: Config, *names: str) -> Inputs:
    """Values of sections, or of single keys, that decide an output."""
    values = config.model_dump(mode="json")
    found: Inputs = {}
    for key in known_fields():
        if key in NOT_DECISIVE or not any(f"{key}.".startswith(f"{name}.") for name in names):
            continue
        section, _, name = key.partition(".")
        value = values[section][name]
        if key == "pack.images":
            value = [_photos(place) for place in value]
        elif key == "scoring.model_config_dir" and value is not None:
            value = _content(f"{value}/{config.scoring.model}.json")
        elif key in FILES:
            value = _contents(value)
        found[key] = value
    return found


def _digests(config: Config, *files: str) -> Inputs:
    """Digests of files, written `ROOT/KEY` with a field of section `paths`."""
    found: Inputs = {}
    for file in files:
        root, _, key = file.partition("/")
        found[f"paths.{file}"] = _digest(getattr(config.paths, root), key)
    return found


def _digest(root: str, key: str) -> str | None:
    """sha256 of a small file; None: there is none."""
    try:
        return sha256_of(open_store(root).read(key))
    except NotFoundError:
        return None


def _contents(value: Any) -> Any:
    """A setting with each path in it replaced by what stands for the file's content."""
    if isinstance(value, str):
        return _content(value)
    if isinstance(value, list):
        return [_contents(item) for item in value]
    if isinstance(value, dict):
        return {key: _contents(item) for key, item in value.items()}
    return value


def _content(url: str) -> str:
    """sha256 of a file; of a large one size and time; of a remote one size; else the text itself
    (no such file, or the name of weights to download).
    """
    root, slash, name = url.rpartition("/")
    try:
        store = open_store(root or (slash or "."))
        path = store.local_path(name)
        if path is None:
            return f"{store.size(name)} bytes"
    except (ConfigError, DataError, NotFoundError):
        return url
    if not path.is_file():
        return url
    if path.stat().st_size <= LARGE:
        return sha256_of(path)
    return _size_and_time(path)


def _photos(place: str) -> str:
    """A zip, tar or table by size and time, a folder by the names in it, a bucket by its URL.

    Photos are too many to be hashed each time: one that was edited under its old name in a folder
    or bucket goes unnoticed.
    """
    path = Path(place)
    if path.is_file():
        return _size_and_time(path)
    if path.is_dir():
        return hashlib.sha256("\0".join(sorted(os.listdir(path))).encode()).hexdigest()
    if any(mark in place for mark in "*?[") and not re.match("s3:", place, re.IGNORECASE):
        found = [local for store, key in find_files(place) if (local := store.local_path(key))]
        files = "\0".join(f"{local.name} {_size_and_time(local)}" for local in found)
        return hashlib.sha256(files.encode("utf-8", "surrogateescape")).hexdigest()
    return place


def _size_and_time(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} bytes, changed at {found.st_mtime_ns} ns"


def _named(
    changes: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any], config: Config
) -> str:
    """The first changes, for people: settings with both values, files with their place."""
    shown = [_shown(name, old, new, config) for name in changes[:3]]
    more = [f"{len(changes) - 3} more"] if len(changes) > 3 else []
    return ", ".join([*shown, *more])


def _shown(name: str, old: Mapping[str, Any], new: Mapping[str, Any], config: Config) -> str:
    section, _, rest = name.partition(".")
    if "/" in name:
        root, _, key = rest.partition("/")
        value = getattr(getattr(config, section), root)
        return f"{value}/{key}" if isinstance(value, str) else key
    if name in FILES:
        return f"{name} ({', '.join(_texts(getattr(getattr(config, section), rest)))})"
    return f"{name} {_short(old.get(name))} -> {_short(new.get(name))}"


def _texts(value: Any) -> Iterator[str]:
    """All texts within a setting; `none` for None."""
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)
    else:
        yield "none" if value is None else str(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "none" if value is None else text if len(text) <= 40 else f"{text[:37]}..."


def read_json(root: str, key: str) -> dict[str, Any]:
    """The object in a file; empty if there is none, or it is damaged."""
    try:
        data = open_store(root).read(key)
        return parse_json(data, dict[str, Any], where=key, remedy="")  # type: ignore[no-any-return]
    except (NotFoundError, DataError):
        return {}
