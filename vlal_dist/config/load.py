"""Read a configuration: YAML file, profile, command line; and the command line of every program.

A profile is a named set of defaults (design 5): it fills keys that neither the file nor the
command line set. `base: other.yaml` in a file starts from that file, beside it.

Flags without a dot are few and fixed (design 9); each program says which of them it takes.
"""

import difflib
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vlal_dist.config.sections import Config, Section
from vlal_dist.errors import ConfigError, UsageError

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
"""Departures of each profile from the defaults of the sections (table of design 5)."""

_VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)\}")


def load_config(
    path: str | None, overrides: Mapping[str, str], *, sections: Sequence[str] | None = None
) -> Config:
    """Read, overlay, check.

    Args:
        path: YAML file; `None` for the defaults alone.
        overrides: dotted key -> text, parsed as YAML (`training.epochs` -> `"3"`).
        sections: sections that will be read; environment variables of the others may be unset
            (training needs no annotations). None: all.

    Raises:
        ConfigError: unreadable file, unset variable, unknown key (with the nearest name), or a
            value out of range.
    """
    values = _read_yaml(Path(path), seen=()) if path is not None else {}
    # A section whose keys are all commented out is empty, not wrong.
    values = {section: {} if keys is None else keys for section, keys in values.items()}
    _check_names(values)
    for key, text in overrides.items():
        _check_key(key)
        _assign(values, key, _parse(key, text))
    for section, keys in values.items():
        _expand(keys, section, required=sections is None or section in sections)
    profile = _lookup(values, "method.profile", "paper")
    for key, value in PROFILES.get(str(profile), {}).items():
        if _lookup(values, key, _ABSENT) is _ABSENT:
            _assign(values, key, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every key spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys, in the order of the sections."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys.extend(known_keys(inner, f"{prefix}{name}."))
        else:
            keys.append(prefix + name)
    return keys


_ABSENT = object()


def _read_yaml(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"config file {path} is its own base; remove the circle")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; give --config FILE") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold sections, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    below = _read_yaml(path.parent / str(base), seen=(*seen, path.resolve()))
    for section, keys in values.items():
        if isinstance(keys, dict) and isinstance(below.get(section), dict):
            below[section].update(keys)
        else:
            below[section] = keys
    return below


def _check_names(values: Mapping[str, Any]) -> None:
    for section, keys in values.items():
        if section not in Config.model_fields:
            _check_key(f"{section}.")
        if not isinstance(keys, dict):
            raise ConfigError(f"config section {section} must hold keys, got {keys!r}")
        for key in keys:
            _check_key(f"{section}.{key}")


def _check_key(key: str) -> None:
    keys = known_keys()
    if key in keys:
        return
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    raise ConfigError(f"unknown key {key}; the nearest known one is {near[0]}")


def _parse(key: str, text: str) -> Any:
    """A command line's text as a value: text where the field is text, YAML elsewhere."""
    section, name = key.split(".", 1)
    kind = Config.model_fields[section].annotation.model_fields[name].annotation  # type: ignore[union-attr]
    if kind is str:
        return text
    if kind == str | None:
        return None if text in ("", "none", "null") else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not a value: {error}") from None


def _assign(values: dict[str, Any], key: str, value: object) -> None:
    section, name = key.split(".", 1)
    values.setdefault(section, {})[name] = value


def _lookup(values: Mapping[str, Any], key: str, default: object) -> object:
    section, name = key.split(".", 1)
    keys = values.get(section, {})
    return keys.get(name, default) if isinstance(keys, dict) else default


def _expand(node: Any, where: str, *, required: bool) -> Any:
    """Replace `${NAME}` by the environment's value, in place, in every string."""
    if isinstance(node, str):
        return _VARIABLE.sub(lambda match: _variable(match, where, required=required), node)
    if isinstance(node, dict):
        for key in node:
            node[key] = _expand(node[key], f"{where}.{key}", required=required)
    elif isinstance(node, list):
        node[:] = [_expand(item, where, required=required) for item in node]
    return node


def _variable(match: re.Match[str], where: str, *, required: bool) -> str:
    name = match.group(1)
    value = os.environ.get(name)
    if not value and required:
        raise ConfigError(
            f"{where} needs the environment variable {name}, which is not set; "
            f"set it, for example: export {name}=PATH"
        )
    return value or match.group(0)


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"][:2])
        lines.append(f"{where}: {item['msg']}, got {item['input']!r}")
    return "; ".join(dict.fromkeys(lines))


DEFAULT_CONFIG = "configs/vaw.yaml"

SWITCHES = ("plan", "retry-quarantined")
FLAGS: dict[str, str] = {
    "plan": "say what would be done, and stop",
    "resume": "auto | PATH | none: continue from a checkpoint",
    "json": "FILE: also write the closing counts there",
    "order": "epoch=E,step=S,steps=K,ranks=W,rank=R,first=F, each optional: print what these steps "
    "train on (first: ranks of the run's first start)",
    "like": "DATASET: use the vocabulary and feasible sets of that dataset",
    "retry-quarantined": "score the shards again that list unusable crops",
    "object-vectors": "FILE: write CLIP text vectors of the object names of paths.instances there, "
    "for clean.object_vectors, and stop",
}


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line.

    Attributes:
        config: the resolved configuration.
        flags: flag name without dashes -> value; switches map to `"true"`.
    """

    config: Config
    flags: Mapping[str, str]


def parse_command_line(
    argv: Sequence[str],
    *,
    flags: Sequence[str],
    sections: Sequence[str] | None = None,
    needs_config: bool = True,
) -> CommandLine:
    """Parse `argv` (without the program's name).

    `--local_rank` is accepted and ignored: launchers add it. `sections` as in `load_config`. Not
    `needs_config`: the defaults alone where no file was named and there is no configs/vaw.yaml.

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
            raise UsageError(f"unexpected argument {word!r}; every setting is --section.key value")
        name, equals, value = word[2:].partition("=")
        if name in flags and name in SWITCHES:
            found[name] = "true"
            continue
        if not (name in ("config", "local_rank") or name in flags or "." in name):
            known = ", ".join(f"--{flag}" for flag in ("config", *flags))
            raise UsageError(f"unknown flag --{name}; known: {known} and --section.key value")
        if not equals:
            if not rest:
                raise UsageError(f"--{name} needs a value")
            value = rest.pop(0)
        if name == "config":
            path = value
        elif name in flags:
            found[name] = value
        elif name != "local_rank":
            overrides[name] = value
    config = load_config(_config_path(path, required=needs_config), overrides, sections=sections)
    return CommandLine(config=config, flags=found)


def help_text(*, usage: str, purpose: str, sections: Sequence[str], flags: Sequence[str]) -> str:
    """The `--help` page: every knob of the named sections with default, unit and source."""
    lines = [f"usage: {usage} [--config FILE] [--section.key value ...]", "", purpose.strip(), ""]
    lines.append(f"  --config FILE    YAML; absent: $VLAL_CONFIG, else {DEFAULT_CONFIG}")
    lines.extend(f"  --{name:<14} {FLAGS[name]}" for name in flags)
    for name in sections:
        section = Config.model_fields[name].annotation
        assert isinstance(section, type) and issubclass(section, Section)
        lines.extend(["", f"{name}: {(section.__doc__ or '').strip()}"])
        for key, field in section.model_fields.items():
            default = field.get_default(call_default_factory=True)
            head = f"  --{name}.{key}  (default: {'none' if default is None else default})"
            body = textwrap.wrap(field.description or "", 92)
            lines.extend([head, *(f"      {line}" for line in body)])
    lines.extend(["", "exit codes: 0 done, 2 usage, 64 config, 65 bad data, 74 I/O,"])
    lines.append("            75 stopped and resumable, 1 other")
    return "\n".join(lines)


def _config_path(given: str | None, *, required: bool) -> str | None:
    named = given or os.environ.get("VLAL_CONFIG")
    path = named or DEFAULT_CONFIG
    if not Path(path).is_file():
        if not (named or required):
            return None
        raise ConfigError(
            f"config file {path} does not exist; give --config FILE, set VLAL_CONFIG, "
            f"or run from the repository so that {DEFAULT_CONFIG} is found"
        )
    return path
