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
    without_flags,
)
from vlal_dist.config.sections import Config, PathsConfig
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
    for spelling in ("--local_rank=1", "--local_rank 1", "--local-rank=1", "--local-rank 1"):
        rank = spelling.split()
        same = parse_command_line([*rank, *argv], flags=("plan", "json"))
        assert same == line and without_flags([*rank, "--plan"], ["plan"]) == rank
    for bad in (["--resume", "auto"], ["--training.seed"], ["word"]):
        with pytest.raises(UsageError):
            parse_command_line(["--config", path, *bad], flags=("plan",))


def test_without_a_configuration_all_settings_are_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAL_CONFIG", write(tmp_path / "v.yaml", "training: {seed: 4}\n"))
    given = parse_command_line([], flags=())
    assert given.config.training.seed == 4 and not given.unaimed
    monkeypatch.delenv("VLAL_CONFIG")
    (tmp_path / "configs").mkdir()  # a checkout, in which another dataset's settings lie
    write(tmp_path / "configs/vaw.yaml", "training: {seed: 5}\n")
    monkeypatch.chdir(tmp_path)
    nothing = parse_command_line(["--training.epochs", "3"], flags=())
    assert nothing.config == load_config(None, {"training.epochs": "3"}) and nothing.unaimed
    assert nothing.config.clean.min_side == 0 and not nothing.config.clean.require_positive
    assert nothing.config.clean.merge == "none" and nothing.config.paths.root == "runs/own"
    assert not parse_command_line(["--paths.run", "here"], flags=()).unaimed


def test_installed_configs_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config("demo", {}).pack.name == "demo"
    own = write(tmp_path / "own.yaml", "base: demo\npaths: {root: here}\n")
    config = load_config(own, {})
    assert config.scoring.model == "demo_clip" and config.paths.run == "here/run"
    with pytest.raises(
        ConfigError, match=r"demos is .* \(demo, fashion12k, fashion12k_sparse, own, vaw"
    ):
        load_config("demos", {})
    with pytest.raises(ConfigError, match=r"config file demos\.yaml: No such file"):
        parse_command_line(["--config", "demos.yaml"], flags=())
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "demo", "training: {seed: 6}\n")  # a file of that name comes first
    assert load_config("demo", {}).training.seed == 6


ROOTS = ("imported", "instances", "dataset", "scores", "merged", "resharded", "run", "export")


@pytest.mark.parametrize(
    ("root", "base", "experiments", "name"),
    [
        ("runs/a", "runs/a", "runs/a/experiments", "a"),
        ("/data/b/", "/data/b", "/data/b/experiments", "b"),
        ("s3://bucket/p/c/", "s3://bucket/p/c", "runs/c/experiments", "c"),
        ("s3://bucket", "s3://bucket", "runs/bucket/experiments", "bucket"),
        (".", ".", "./experiments", "folder"),
    ],
)
def test_every_root_follows_from_one(
    root: str,
    base: str,
    experiments: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    config = load_config(None, {"paths.root": root})
    assert [getattr(config.paths, one) for one in ROOTS] == [f"{base}/{one}" for one in ROOTS]
    assert (config.paths.experiments, config.paths.cache) == (experiments, "runs/cache")
    assert config.pack.name == name
    assert PathsConfig(root=root) == config.paths


def test_an_explicit_path_or_name_wins_over_the_root(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "paths: {run: other}\npack: {name: mine}\n")
    config = load_config(path, {"paths.root": "s3://b/p", "paths.merged": "m"})
    assert (config.paths.run, config.paths.merged, config.pack.name) == ("other", "m", "mine")
    assert config.paths.scores == "s3://b/p/scores"
    with pytest.raises(ConfigError, match=r"paths\.root: .* at least 1"):
        load_config(None, {"paths.root": ""})
    assert Config() == load_config(None, {})
    assert Config().paths.run == "runs/own/run" and Config().pack.name == "own"


RESOLVED = {
    "vaw": ("runs/vaw", "runs/cache", "vaw", 256_000_000, 12, (), 30),
    "demo": ("runs/demo", "runs/demo/cache", "demo", 4_000_000, 16, ("train",), 5),
    "fashion12k": (
        "runs/fashion12k", "runs/cache", "fashion12k", 4_000_000, 8, ("train", "val", "test"), 30,
    ),
    "fashion12k_sparse": (
        "runs/fashion12k_sparse", "runs/cache", "fashion12k", 4_000_000, 8,
        ("train", "val", "test"), 30,
    ),
}  # fmt: skip
"""Root, cache, name, bytes of a shard, epochs, splits scored, NUM_IGNORE of the installed ones."""


@pytest.mark.parametrize("name", RESOLVED)
def test_the_installed_configs_resolve_to_what_they_always_did(name: str) -> None:
    root, cache, dataset, shard_bytes, epochs, splits, num_ignore = RESOLVED[name]
    config = load_config(name, {}, sections=())
    assert config.paths.model_dump() == {
        "root": root,
        **{one: f"{root}/{one}" for one in (*ROOTS, "experiments")},
        "cache": cache,
    }
    assert (config.pack.name, config.pack.shard_bytes) == (dataset, shard_bytes)
    assert (config.training.epochs, config.method.num_ignore) == (epochs, num_ignore)
    assert config.scoring.splits == list(splits or ["train"])
    assert list(config.clean.annotations) == ["train", "val", "test"]  # the merge reads in order


def test_an_entry_of_a_mapping_is_a_key(tmp_path: Path) -> None:
    text = "clean: {annotations: {train: [a.json], val: b.json}, renames: {mug: cup}}\n"
    path = write(tmp_path / "a.yaml", text)
    overrides = {
        "clean.annotations.train": "x.json",
        "clean.annotations.test": "[y.json, z.json]",
        "clean.renames.tee.2": "3",
        "clean.expected.read": "{instances: 4}",
        "data.mix.runs/v1.2/merged": "0.5",
    }
    config = load_config(path, overrides)
    assert config.clean.annotations == {
        "train": ["x.json"],
        "val": ["b.json"],
        "test": ["y.json", "z.json"],
    }
    assert config.clean.renames == {"mug": "cup", "tee.2": "3"}
    assert config.clean.expected == {"read": {"instances": 4}}
    assert config.data.mix == {"runs/v1.2/merged": 0.5}
    assert load_config(None, {"pack.images": "a.zip"}).pack.images == ["a.zip"]
    for wrong, message in (
        ({"training.seed.x": "3"}, r"unknown key training\.seed\.x; .* training\.seed"),
        ({"clean.annotation.train": "3"}, r"nearest known one is clean\.annotations"),
        ({"clean.annotations": "a.json", "clean.annotations.train": "b"}, "must hold keys"),
        ({"clean.annotations.train": "[1]"}, r"clean\.annotations\.train: .* valid string"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, wrong)


def test_help_describes_every_key() -> None:
    text = help_text(
        usage="x", purpose="y", sections=tuple(Config.model_fields), flags=tuple(FLAGS)
    )
    for key in known_fields():
        assert f"--{key} " in text
    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


@pytest.mark.parametrize("url", ["s3://key7:sec7/ret7@bucket/x", "s3://key7@bucket", "S3://key7:7"])
@pytest.mark.parametrize(("key", "form"), [("paths.run", "{}"), ("pack.images", "[photos, '{}']")])
def test_credentials_in_s3_urls_are_refused_and_not_shown(url: str, key: str, form: str) -> None:
    with pytest.raises(ConfigError, match="holds no credentials") as caught:
        load_config(None, {key: form.format(url)})
    assert key in str(caught.value) and "7" not in str(caught.value)
