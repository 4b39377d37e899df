"""The command line that every program shares: `--config FILE --section.key value`, and help.

Flags without a dot are few and fixed (design 9); each program says which of them it takes.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlal_dist.config.config import Config
from vlal_dist.config.load import load_config
from vlal_dist.config.section import Section
from vlal_dist.errors import ConfigError, UsageError

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
