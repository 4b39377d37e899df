"""Reading configuration: names, values, profiles, environment, bases; all errors are 64."""

from pathlib import Path

import pytest
import yaml

from vlal_dist.config.load import (
    FLAGS,
    PROFILES,
    config_yaml,
    help_text,
    known_fields,
    load_config,
    parse_command_line,
)
from vlal_dist.config.sections import Config
from vlal_dist.errors import ConfigError, UsageError


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_are_the_papers() -> None:
    config = load_config(None, {})
    assert (config.method.num_ignore, config.method.draw_over) == (30, "feasible")
    gammas = config.method
    assert (gammas.gamma_positive, gammas.gamma_negative) == (1, 2)
    assert (gammas.gamma_feasible, gammas.gamma_infeasible) == (4, 7)
    assert (config.method.margin, config.method.detach_focal) == (0.05, True)
    assert (config.training.epochs, config.training.batch_size) == (12, 64)
    assert (config.training.lr_new, config.training.lr_pretrained) == (7e-4, 1e-5)
    assert config.training.plateau_patience == 2 and not config.data.normalize
    assert config.pack.box_expansion == 0 and config.clean.feasible_splits == ["train"]


def test_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "training: {epochs: 3, batch_size: 8}\n")
    config = load_config(path, {"training.epochs": "5", "method.num_ignore": "all"})
    assert (config.training.epochs, config.training.batch_size) == (5, 8)
    assert config.method.num_ignore == "all"


def test_text_stays_text_and_lists_are_lists(tmp_path: Path) -> None:
    overrides = {
        "pack.name": "123",
        "pack.images": "[a, b]",
        "scoring.weights": "none",
        "clean.renames": "{a: b}",
        "data.normalize": "true",
    }
    config = load_config(None, overrides)
    assert config.pack.name == "123" and config.pack.images == ["a", "b"]
    assert config.scoring.weights is None and config.clean.renames == {"a": "b"}
    assert config.data.normalize


def test_a_base_is_overlaid_key_by_key(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "training: {epochs: 3, seed: 1}\nmodel: {depth: 18}\n")
    config = load_config(write(tmp_path / "b.yaml", "base: base.yaml\ntraining: {seed: 2}\n"), {})
    assert (config.training.epochs, config.training.seed, config.model.depth) == (3, 2, 18)
    circle = write(tmp_path / "c.yaml", "base: c.yaml\n")
    with pytest.raises(ConfigError, match="its own base"):
        load_config(circle, {})


def test_an_empty_section_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "e.yaml", "training:\n  # epochs: 3\nmodel: {depth: 18}\n")
    assert load_config(path, {"training.seed": "4"}).training.seed == 4


def test_profiles_fill_only_what_nobody_set() -> None:
    released = load_config(None, {"method.profile": "released"})
    assert released.method.num_ignore == 0 and released.clean.feasible_splits == ["train", "val"]
    assert (released.clean.feasible_top_k, released.training.plateau_patience) == (3, 0)
    corrected = load_config(None, {"method.profile": "corrected", "pack.box_expansion": "0.1"})
    assert corrected.method.draw_over == "unannotated" and corrected.data.normalize
    assert corrected.pack.box_expansion == 0.1
    assert {key for values in PROFILES.values() for key in values} <= set(known_fields())


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "e.yaml", "pack: {images: ['${PHOTOS}/x.zip']}\n")
    monkeypatch.setenv("PHOTOS", "here")
    assert load_config(path, {}).pack.images == ["here/x.zip"]
    monkeypatch.delenv("PHOTOS")
    with pytest.raises(ConfigError, match=r"pack\.images needs the environment variable PHOTOS"):
        load_config(path, {})
    # A program that does not read the section does not need the variable.
    assert load_config(path, {}, sections=("training",)).pack.images == ["${PHOTOS}/x.zip"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.epoch": "3"}, "nearest known one is training.epochs"),
        ({"trainin.epochs": "3"}, "nearest known one is training.epochs"),
        ({"training.epochs": "0"}, "greater than or equal to 1"),
        ({"training.epochs": "many"}, "valid integer"),
        ({"data.image_size": "63"}, "greater than or equal to 64"),
        ({"method.loss": "mse"}, "selective"),
        ({"method.margin": "1"}, "less than 1"),
        ({"method.num_ignore": "-5"}, "greater than or equal to 0"),
        ({"training.lr_new": ".inf"}, "finite"),
        ({"model.depth": "19"}, "18, 34, 50 or 101"),
    ],
)
def test_errors_say_what_is_allowed(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "training: 3", "nothing: {a: 1}", "training: {epochz: 1}", "a: b: c", "\xff"]
)
def test_bad_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_config(str(path), {})
    with pytest.raises(ConfigError, match="No such file"):
        load_config(str(tmp_path / "absent.yaml"), {})


def test_the_resolved_config_reads_back(tmp_path: Path) -> None:
    config = load_config(None, {"method.profile": "corrected", "training.seed": "5"})
    again = load_config(write(tmp_path / "r.yaml", config_yaml(config)), {})
    assert again == config
    assert set(yaml.safe_load(config_yaml(config))) == set(Config.model_fields)


def test_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "training: {epochs: 3}\n")
    argv = ["--config", path, "--training.seed=7", "--local_rank=1", "--plan", "--json", "out"]
    line = parse_command_line(argv, flags=("plan", "json"))
    assert line.config.training.seed == 7 and line.flags == {"plan": "true", "json": "out"}
    for bad in (["--resume", "auto"], ["--training.seed"], ["word"]):
        with pytest.raises(UsageError):
            parse_command_line(["--config", path, *bad], flags=("plan",))


def test_default_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLAL_CONFIG", write(tmp_path / "v.yaml", "training: {seed: 4}\n"))
    assert parse_command_line([], flags=()).config.training.seed == 4
    monkeypatch.delenv("VLAL_CONFIG")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="give --config FILE"):
        parse_command_line([], flags=())


def test_help_describes_every_key() -> None:
    text = help_text(
        usage="x", purpose="y", sections=tuple(Config.model_fields), flags=tuple(FLAGS)
    )
    for key in known_fields():
        assert f"--{key} " in text
    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


def test_a_program_may_do_without_a_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLAL_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    line = parse_command_line(["--training.seed", "5"], flags=(), needs_config=False)
    assert line.config == load_config(None, {"training.seed": "5"})
    with pytest.raises(ConfigError, match="does not exist"):  # a named one must be there
        parse_command_line(["--config", "none.yaml"], flags=(), needs_config=False)
