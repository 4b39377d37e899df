"""Configuration files, flags and environment: every error is bounded, and names what is wrong."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from tests.fuzz.mutations import (
    VALUES,
    byte_ops,
    explore,
    mutate_bytes,
    mutate_json,
    obeys,
    tree_ops,
)
from vlal_dist.config.load import FLAGS, INSTALLED, config_yaml, known_fields, load_config
from vlal_dist.config.load import parse_command_line as parse
from vlal_dist.config.sections import Config

TEXT = (INSTALLED / "vaw.yaml").read_bytes()
JSON = json.dumps(yaml.safe_load(config_yaml(Config()))).encode()


def use(path: Path) -> Config:
    config = load_config(path, {})
    assert load_config(path, {}) == config
    config_yaml(config)
    return config


@pytest.fixture(autouse=True)
def _annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VAW_ANNOTATIONS", "VG_IMAGES", "VAW_DIR", "VG_DIR"):
        monkeypatch.setenv(name, "x")


def test_files(tmp_path: Path, times: int) -> None:
    path = tmp_path / "config.yaml"

    def check(as_tree: bool, tree: Any, ops: Any) -> None:
        path.write_bytes(mutate_json(JSON, tree) if as_tree else mutate_bytes(TEXT, ops))
        obeys(lambda: use(path))

    explore("configuration", check, st.booleans(), tree_ops, byte_ops, examples=60, times=times)


marks = st.text(
    st.sampled_from("&a *b<<:{}[],'\"!|>-?\n\t %@`#~0x1e9.=\0\ud800é" + "ab"), max_size=40
)


def test_yaml_text(tmp_path: Path, times: int) -> None:
    """What the syntax of YAML is made of, in any order."""
    path = tmp_path / "config.yaml"

    def check(text: str) -> None:
        path.write_bytes(f"training:\n  epochs: {text}\n".encode(errors="surrogatepass"))
        obeys(lambda: use(path))

    explore("YAML text", check, marks, examples=250, times=times)


def test_flags(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLAL_CONFIG", str(INSTALLED / "demo.yaml"))
    keys = [f"--{key}" for key in known_fields()]
    word = (
        st.sampled_from([*keys, *(f"--{flag}" for flag in FLAGS), "--config", "--", "-", "--a.b"])
        | marks
        | st.sampled_from(VALUES).map(lambda one: repr(one)[:5000])
        | st.text(string.printable, max_size=10)
    )

    def check(words: list[str], name: str, value: str) -> None:
        monkeypatch.setenv("X", value.replace("\0", "").encode(errors="ignore").decode())
        obeys(lambda: parse([*words, name, value], flags=list(FLAGS)))

    drawn = st.lists(word, max_size=4), st.sampled_from(keys), word
    explore("flags", check, *drawn, examples=250, times=times)
