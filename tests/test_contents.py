"""JSON and YAML of strangers within bounds, and messages that quote them."""

import json
import time
from pathlib import Path

import pytest

from vlal_dist.config.load import load_config, parse_command_line
from vlal_dist.contents import YAML_CHARACTERS, parse_json, parse_yaml, shown
from vlal_dist.errors import LONGEST, ConfigError, DataError, UsageError, bounded

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Some hundred bytes that stand for 9^9 texts."""


def test_aliases_that_stand_for_millions_of_values(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("clean:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()))
    started = time.monotonic()
    with pytest.raises(ConfigError, match="more than 20000 values, aliases resolved") as error:
        load_config(path, {})
    assert len(str(error.value)) < 500 and time.monotonic() - started < 2
    with pytest.raises(ConfigError, match=r"training\.epochs: .*stands for a value that holds it"):
        load_config(None, {"training.epochs": "&a [*a]"})
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x}", where="f")["d"] == {"b": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 5000, "nested too deeply"),
        ("a: !!int x", "not YAML: invalid literal"),
        ("a: !!timestamp 2000-99-99", "not YAML: month"),
        ("a: " + "1" * 5000, "a number of 5000 characters"),
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice in the section that begins in line 1"),
        ("#" * (YAML_CHARACTERS + 1), "at most 100000 are read"),
        ("a: \0", "not YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_yaml(text, where="f")


def test_a_long_value_is_quoted_in_part() -> None:
    for overrides in ({"training.epochs": "x" * 10**6}, {"x" * 10**5: "1"}):
        with pytest.raises(ConfigError) as error:
            load_config(None, overrides)
        assert len(str(error.value)) < 1000
    for words in (["x" * 10**6], [f"--{'x' * 10**6}"]):
        with pytest.raises(UsageError) as refused:
            parse_command_line(words, flags=[])
        assert len(str(refused.value)) < 1000


def test_keys_and_sections_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("1: {a: 2}", "training: {1: 2}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="a key must be text, got 1"):
            load_config(path, {})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[" * 100_000, "recursion limit"),
        (b'{"a": NaN}', "expected value"),
        (b'{"a": "\\ud800"}', "unexpected end of hex escape"),
        (b'{"a": "\xff"}', "invalid unicode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"a": 1.0}', "a: Input should be a valid integer, got 1.0"),
        (b'{"a": true}', "a: Input should be a valid integer, got True"),
        (b"[]", "Input should be an object"),
    ],
)
def test_json_that_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=f"^f is damaged .*{problem}.*; fetch it again$"):
        parse_json(data, dict[str, int], where="f", remedy="fetch it again")


def test_json_is_read_as_python_reads_it() -> None:
    value = {"a": [1, 0.1, 1e-320, -0.0, 2**64, "\N{SNOWMAN}\n", None, True], "b": {}}
    assert parse_json(json.dumps(value), where="f", remedy="") == value


def test_messages_keep_their_remedy_and_have_a_longest_length() -> None:
    text = str(DataError("x" * 10**6 + "; run vlal verify"))
    assert len(text) == LONGEST and text.endswith("; run vlal verify")
    assert bounded("abc") == "abc" and len(bounded("y" * 999)) == 200
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep, deep]
    assert len(shown(deep)) <= 200 and len(shown({"k" * 999: ["v" * 999] * 999})) <= 200
    assert shown(10**5000) and shown("\ud800") == "'\\ud800'"
