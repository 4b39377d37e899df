"""Load the configuration: YAML file, profile, environment, command line, in one typed `Config`.

Later sources win: the defaults of the sections, the profile (`method.profile`, docs/method.md), the
file's `base: other.yaml`, the file, the command line. Flags are documented in docs/command-line.md.
"""

import difflib
import os
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from vlal_dist.config.paths import PathsConfig, root_name
from vlal_dist.config.sections import Config
from vlal_dist.contents import YAML_CHARACTERS, parse_yaml, shown
from vlal_dist.errors import ConfigError, UsageError, bounded

PROFILES: dict[str, dict[str, object]] = {
    "paper": {},
    "released": {
        "clean.feasible_splits": ["train", "val"],
        "clean.feasible_top_k": 3,
        "clean.feasible_votes": 2,
        "method.num_ignore": 0,
        "training.plateau_patience": 0,
    },
    "corrected": {
        "method.draw_over": "unannotated",
        "data.normalize": True,
        "pack.box_expansion": 0.3,
    },
}
"""What each profile changes in the defaults of the sections."""

INSTALLED = Path(__file__).parents[1] / "configs"
"""Folder of the configurations that come with the package."""

SWITCHES = ("plan", "order", "retry-quarantined", "retry-rejected", "replace")
FLAGS: dict[str, str] = {
    "plan": "print what would be done and stop",
    "from": "STAGE: first stage (default: the first one)",
    "to": "STAGE: last stage (default: the last one)",
    "resume": "auto | PATH | none: continue from a checkpoint",
    "engine": "local | ray: processes of this machine, or tasks on a Ray (default: local)",
    "json": "FILE: also write the closing counts there",
    "order": "print what the steps selected by the flags below train on",
    "epoch": "E: epoch of the steps, from 0 (default: 0)",
    "step": "S: first step in that epoch, from 0 (default: 0)",
    "steps": "K: number of steps (default: 1)",
    "ranks": "N: ranks that share a step (default: 1)",
    "rank": "R: print the samples of this rank only",
    "first-ranks": "F: ranks of the run's first start (default: N)",
    "limit": "N: import the first N photos of each split, for a try",
    "like": "DATASET: use the vocabulary and feasible sets of that dataset",
    "retry-quarantined": "score shards with unusable crops again",
    "retry-rejected": "pack: pack what was rejected and can be packed now, as if it had been there "
    "from the beginning; score, merge: renew what that changed",
    "replace": "remove what this program wrote in its root before, and write it again",
    "object-vectors": "FILE: write CLIP text vectors of the object names of paths.instances there, "
    "for clean.object_vectors, and stop",
}
"""Flags without a dot; each program accepts some of them."""

SHARED_FLAGS = (
    "  --config FILE            YAML file, or the name of one that is installed: vaw, demo, ...",
    "  --section.key VALUE      one setting of it",
    "  --json FILE              also write the closing counts there",
    "  --help, --version        print it, and stop",
)
EXIT_CODES = (
    "exit codes: 0 done, 2 usage, 64 config, 65 bad data, 74 I/O,",
    "            75 stopped and resumable, 1 other",
)

_LOCAL_RANK = ("local_rank", "local-rank")
"""DeepSpeed's and older torch's spelling of the flag that they add; LOCAL_RANK says the same."""
_S3_KEYS = re.compile(r"s3://[^/]*[:@]", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)\}")


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line.

    Attributes:
        config: the resolved configuration.
        flags: flag name without dashes -> value; switches map to `"true"`.
        unaimed: neither a configuration nor a path was given, so that all roots are the defaults.
    """

    config: Config
    flags: Mapping[str, str]
    unaimed: bool = False


def parse_command_line(
    argv: Sequence[str],
    *,
    flags: Sequence[str],
    sections: Sequence[str] | None = None,
) -> CommandLine:
    """Parse the command line of a program and load its configuration.

    Args:
        argv: arguments without the program's name. `--local_rank` and `--local-rank`,
            which launchers add, are ignored.
        flags: names in `FLAGS` that the program accepts.
        sections: as in `load_config`.

    Raises:
        UsageError: an unknown flag, a missing value, a positional argument.
        ConfigError: an unknown key or a value out of range.
    """
    path: str | None = None
    overrides: dict[str, str] = {}
    found: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UsageError(
                f"unexpected argument {shown(word)}; every setting is --section.key value"
            )
        name, equals, value = word[2:].partition("=")
        if name in flags and name in SWITCHES:
            found[name] = "true"
            continue
        if not (name in ("config", *_LOCAL_RANK) or name in flags or "." in name):
            known = ", ".join(f"--{flag}" for flag in ("config", *flags))
            raise UsageError(
                f"unknown flag {bounded(word)}; known: {known} and --section.key value"
            )
        if not equals:
            if not rest:
                raise UsageError(f"--{bounded(name)} needs a value")
            value = rest.pop(0)
        if name == "config":
            path = value
        elif name in flags:
            found[name] = value
        elif name not in _LOCAL_RANK:
            overrides[name] = value
    path = path or os.environ.get("VLAL_CONFIG") or None
    config = load_config(path, overrides, sections=sections)
    unaimed = path is None and not any(key.startswith(("paths.", "predict.")) for key in overrides)
    return CommandLine(config=config, flags=found, unaimed=unaimed)


def without_flags(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """The arguments of a command line without some of its flags and their values.

    Args:
        argv: arguments without the program's name.
        flags: names in `FLAGS`.
    """
    kept, rest = list[str](), list(argv)
    while rest:
        words = [rest.pop(0)]
        name, equals, _ = words[0].removeprefix("--").partition("=")
        if rest and not equals and name not in SWITCHES:
            words.append(rest.pop(0))
        if name not in flags:
            kept += words
    return kept


def load_config(
    path: str | Path | None, overrides: Mapping[str, str], *, sections: Sequence[str] | None = None
) -> Config:
    """Read, overlay and validate a configuration.

    Args:
        path: YAML file, or the name of an installed one; `None` for the defaults alone.
        overrides: dotted key -> text, parsed as YAML (`training.epochs` -> `"3"`).
        sections: sections that will be read; environment variables of the others may be unset
            (training needs no annotations). None: all.

    Raises:
        ConfigError: unreadable file, unset variable, unknown key (with the nearest name), or a
            value out of range.
    """
    values = _read_yaml(_find(str(path)), seen=()) if path is not None else {}
    for key, text in overrides.items():
        _override(values, key, text)
    values = {
        section: _expand(keys, section, required=sections is None or section in sections)
        for section, keys in values.items()
    }
    _refuse_credentials(values)
    root = values.get("paths", {}).get("root", PathsConfig().root)
    values.setdefault("pack", {}).setdefault("name", root_name(str(root)))
    profile = values.get("method", {}).get("profile", "paper")
    for key, value in PROFILES.get(str(profile), {}).items():
        section, name = key.split(".")
        values.setdefault(section, {}).setdefault(name, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(dict.fromkeys(_messages(error)))) from None


def _refuse_credentials(values: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse S3 URLs with keys in them before any is opened, printed or recorded."""
    for section, keys in values.items():
        for key, value in keys.items():
            if any(_S3_KEYS.match(str(x)) for x in (value if isinstance(value, list) else [value])):
                raise ConfigError(
                    f"{section}.{key}: an S3 URL is written s3://bucket/prefix and holds no "
                    "credentials; give those by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                    "AWS_PROFILE"
                )


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every key spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_fields() -> dict[str, FieldInfo]:
    """Dotted key -> its field, in the order of the sections."""
    return {
        f"{section}.{name}": field
        for section, keys in Config()
        for name, field in type(keys).model_fields.items()
    }


def help_text(*, usage: str, purpose: str, sections: Sequence[str], flags: Sequence[str]) -> str:
    """The `--help` page: every key of the named sections, or a single `section.key`."""
    lines = [f"usage: {usage} [--config FILE] [--section.key value ...]", "", purpose.strip(), ""]
    lines.append("  --config FILE    YAML file, or the name of an installed one (vaw, demo, ...);")
    lines.append("                   absent: $VLAL_CONFIG, else the defaults below")
    lines.extend(f"  --{name:<14} {FLAGS[name]}" for name in flags)
    fields = known_fields()
    for name in sections:
        purpose = type(getattr(Config(), name.partition(".")[0])).__doc__ or ""
        lines.extend(["", f"{name}: {purpose.splitlines()[0]}"])
        for key in (key for key in fields if f"{key}.".startswith(f"{name}.")):
            default = fields[key].get_default(call_default_factory=True)
            lines.append(f"  --{key}  (default: {'none' if default is None else default})")
            body = textwrap.wrap(fields[key].description or "", 92)
            lines.extend(f"      {line}" for line in body)
    lines.extend(["", *EXIT_CODES])
    return "\n".join(lines)


def _find(name: str, *, folder: Path = Path()) -> Path:
    """A config file by its path, relative to `folder`, or an installed one by its name."""
    path, installed = folder / name, INSTALLED / f"{name}.yaml"
    if path.is_file() or name != path.stem:
        return path
    if not installed.is_file():
        known = ", ".join(sorted(one.stem for one in INSTALLED.glob("*.yaml")))
        raise ConfigError(
            f"config {bounded(name)} is no file and none of the installed ones ({known}); give "
            "FILE.yaml"
        )
    return installed


def _read_yaml(path: Path, *, seen: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """Section -> keys, those of the file's `base` below its own."""
    if path.resolve() in seen:
        raise ConfigError(f"config file {path} is its own base; remove the circle")
    try:
        with path.open("rb") as file:  # one that never ends, such as a device, is refused too
            text = file.read(4 * YAML_CHARACTERS + 1).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; give --config FILE") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    values = parse_yaml(text, where=f"config file {path}") or {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold sections, got {type(values).__name__}")
    base = values.pop("base", None)
    merged = (
        {}
        if base is None
        else _read_yaml(_find(str(base), folder=path.parent), seen=(*seen, path.resolve()))
    )
    for section, keys in values.items():
        if not isinstance(keys, dict | None):
            raise ConfigError(f"config section {shown(section)} must hold keys, got {shown(keys)}")
        if wrong := [name for name in (section, *(keys or ())) if not isinstance(name, str)]:
            raise ConfigError(f"config file {path}: a key must be text, got {shown(wrong[0])}")
        merged.setdefault(section, {}).update(keys or {})  # None: all its keys are commented out
    return merged


def _override(values: dict[str, dict[str, Any]], key: str, text: str) -> None:
    """Set `section.name`, or an entry of a setting that is a mapping: `section.name.entry`."""
    section, _, name = key.partition(".")
    keys = values.setdefault(section, {})
    field, _, entry = name.partition(".")
    known = known_fields().get(f"{section}.{field}")
    kind = None if known is None else known.annotation
    if entry and get_origin(kind) is dict:
        entries = keys.get(field) or {}
        if not isinstance(entries, dict):
            raise ConfigError(f"{section}.{field} must hold keys, got {shown(entries)}")
        keys[field] = {**entries, entry: _parse(key, text, get_args(kind)[1])}
    else:
        keys[name] = _parse(key, text, None if entry else kind)


def _parse(key: str, text: str, kind: Any) -> Any:
    """A command line's text as a value: text where the setting is text, YAML elsewhere."""
    if kind is str:
        return text
    if kind == str | None:
        return None if text in ("", "none", "null") else text
    return parse_yaml(text, where=f"{bounded(key)}: {shown(text)}")


def _expand(node: Any, where: str, *, required: bool) -> Any:
    """A value with each `${NAME}` in its strings replaced by the environment's value."""

    def value_of(match: re.Match[str]) -> str:
        name = match.group(1)
        value = os.environ.get(name)
        if not value and required:
            raise ConfigError(
                f"{where} needs the environment variable {name}, which is not set; "
                f"set it, for example: export {name}=PATH"
            )
        return value or match.group(0)

    if isinstance(node, str):
        return _VARIABLE.sub(value_of, node)
    if isinstance(node, dict):
        return {
            key: _expand(item, f"{where}.{key}", required=required) for key, item in node.items()
        }
    if isinstance(node, list):
        return [_expand(item, where, required=required) for item in node]
    return node


def _messages(error: ValidationError) -> Iterator[str]:
    """What is wrong with each key, and for an unknown one the nearest that is known."""
    fields = known_fields()
    for item in error.errors():
        key, *inner = ".".join(map(str, item["loc"][:2])), *item["loc"][2:3]
        if inner and key in fields and get_origin(fields[key].annotation) is dict:
            key += f".{inner[0]}"
        if item["type"] != "extra_forbidden":
            yield f"{bounded(key)}: {bounded(item['msg'])}, got {shown(item['input'])}"
            continue
        if len(item["loc"]) == 1:  # the section
            key += "." + next(iter(item["input"]), "")
        key = bounded(key)
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
        yield f"unknown key {key}; the nearest known one is {near[0]}"
