"""Contents of files that others wrote, parsed and quoted within bounds.

A dataset, a run or a model may come from a stranger. What is read here ends in a value of the
stated type or in a `DataError`: no depth, size or alias in a file ends the process or fills its
memory.
"""

import functools
import reprlib
from collections import Counter
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import is_typeddict

from vlal_dist.errors import ConfigError, DataError, bounded

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A number of things, or of bytes."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A number that is neither infinite nor NaN."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
Side = Annotated[int, Field(ge=1, le=16_384)]
"""Width or height of a model's input, pixels."""
Expansion = Annotated[float, Field(ge=0, le=100)]
"""Margin around a box, a share of its sides."""
AtLeastOne = Field(min_length=1)
"""Annotation of a list that is not empty."""
Colour = Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$")]
"""A colour, `#rrggbb`."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number in [0, 1]."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A digest: 64 lower-case hex digits."""
UidHex = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""A sample's uid in JSON (docs/formats.md)."""

YAML_CHARACTERS = 100_000
"""Longest configuration file that is read; those that come with the package have 4,000."""
YAML_NODES = 20_000
"""Most values of one, each alias (`*name`) counted with all that it stands for."""

_INT, _DIGITS = "tag:yaml.org,2002:int", 18

_quote = reprlib.Repr()
_quote.maxlevel, _quote.maxlist, _quote.maxdict, _quote.maxtuple = 3, 8, 8, 8
_quote.maxstring = _quote.maxother = 160
_quote.maxlong = 80


def shown(value: object, *, most: int = 200) -> str:
    """`repr` of a value for a message, at most `most` characters, whatever the value's size."""
    try:
        return bounded(_quote.repr(value), most=most)
    except ValueError:  # an integer of more digits than Python prints
        return f"<{type(value).__name__} too long to show>"


def parse_json(
    data: bytes | str, kind: Any = Any, *, where: str, remedy: str, nan: bool = False
) -> Any:
    """Parse JSON into a type, strictly: no float for an int, no NaN, no lone surrogate.

    Args:
        data: the file; UTF-8.
        kind: what it must be: a dataclass, `dict[str, int]`, ...; unknown keys of a TypedDict
            stay, those of a dataclass are ignored.
        where: name of the file, which begins the message.
        remedy: what to do, which ends it.
        nan: whether NaN and infinity may occur all the same.

    Raises:
        DataError: no JSON, nested too deeply, or another type; names the first keys that are wrong.
    """
    try:
        values = from_json(data, allow_inf_nan=nan)
        checked = _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        wrong = "; ".join(_problem(item) for item in error.errors(include_url=False)[:3])
        raise DataError(f"{where} is damaged ({wrong}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is damaged ({bounded(str(error))}); {remedy}") from None
    return values if is_typeddict(kind) else checked


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        ConfigError: no YAML, a key that occurs twice, too long, nested too deeply, or aliases that
            stand for too many values.
    """
    if len(text) > YAML_CHARACTERS:
        raise ConfigError(
            f"{where} has {len(text)} characters, at most {YAML_CHARACTERS} are read; give a "
            "configuration file"
        )
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _count_nodes(node, {})
        return yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply; write it flat") from None
    except Exception as error:  # of a value, such as `!!int x`, the constructor raises any type
        raise ConfigError(f"{where} is not YAML: {bounded(str(error), most=600)}") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _problem(item: Any) -> str:
    """One problem that pydantic found: the key, what is wrong, and the value."""
    key = ".".join(bounded(str(part), most=80) for part in item["loc"])
    if item["type"] in ("json_invalid", "missing"):
        return bounded(f"{key}: {item['msg']}" if key else item["msg"])
    key = key and f"{key}: "
    return bounded(f"{key}{item['msg']}, got {shown(item['input'], most=80)}", most=300)


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, aliases resolved; ValueError where they are too many or a circle."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias stands for a value that holds it; write the value out")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        name, times = Counter(names).most_common(1)[0] if names else ("", 0)
        if times > 1:
            line = node.start_mark.line + 1
            raise ValueError(
                f"the key {shown(name)} occurs twice in the section that begins in line {line}; "
                "keep one of them"
            )
        total += sum(_count_nodes(one, known) for pair in node.value for one in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_nodes(one, known) for one in node.value)
    elif node.tag == _INT and len(node.value) > _DIGITS:
        raise ValueError(f"a number of {len(node.value)} characters; at most {_DIGITS} are read")
    if total > YAML_NODES:
        raise ValueError(f"more than {YAML_NODES} values, aliases resolved; write fewer")
    known[id(node)] = total
    return total
