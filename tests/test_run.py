"""`vlal run`: recorded inputs, decisions, the plan, a whole run, kills in each stage."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.fixtures.tiny_vaw import write_small_vaw
from vlal_dist.config.load import load_config, without_flags
from vlal_dist.config.sections import Config
from vlal_dist.errors import UsageError
from vlal_dist.evaluate import PROGRAM as EVALUATE
from vlal_dist.experimenting.jobs import EXECUTION
from vlal_dist.pipeline import (
    Stage,
    changed,
    decide,
    plan,
    plan_table,
    stage_remarks,
    stages_of,
)
from vlal_dist.program import run_program
from vlal_dist.run import OWN_FLAGS, closing, gpu_count, main, result_table, say_remarks, select

ALL = [
    "clean", "pack", "score", "merge", "train", "evaluate val", "evaluate test",
    "evaluate test constant", "report", "export",
]  # fmt: skip


def resolve(folder: Path, **overrides: str) -> Config:
    """The settings of files that `finish` makes, with `section__key=value` changes."""
    files = {
        "paths.root": str(folder / "root"),
        "clean.annotations": f"{{train: [{folder}/a.json], val: [{folder}/b.json]}}",
        "clean.merge": "none",
        "pack.images": f"[{folder}/photos, {folder}/photos.zip]",
        "scoring.weights": str(folder / "clip.safetensors"),
        "model.weights": str(folder / "resnet.safetensors"),
        "evaluation.truth": str(folder / "truth.parquet"),
    }
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(None, {**files, **changes})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Folder in which every stage of `resolve(folder)` has finished, with content of no meaning."""
    (tmp_path / "photos").mkdir()
    for name in ("a.json", "b.json", "photos/1.jpg", "photos.zip", "clip.safetensors",
                 "resnet.safetensors", "truth.parquet"):  # fmt: skip
        (tmp_path / name).write_text(name)
    for stage in stages_of(resolve(tmp_path)):
        finish(stage)
    (tmp_path / "root/run/checkpoints/00000010").mkdir(parents=True)
    (tmp_path / "root/run/checkpoints/00000010/COMPLETE").write_text("{}")
    return tmp_path


def finish(stage: Stage) -> None:
    """Leave what a stage leaves when it has finished."""
    inputs = stage.inputs(stage.config, {})
    for place, text in (
        (stage.output, stage.title),
        (stage.record, json.dumps({"code": 0, "reason": "done", "counts": {}, "inputs": inputs})),
    ):
        path = Path(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def to_do(config: Config) -> dict[str, str]:
    """Title -> why, of the stages that are not up to date by themselves."""
    decisions = {stage.title: decide(stage) for stage in stages_of(config)}
    return {title: one.why for title, one in decisions.items() if one.action != "skip"}


def test_a_configuration_needs_these_stages(tmp_path: Path) -> None:
    def titles(**overrides: str) -> list[str]:
        return [stage.title for stage in stages_of(resolve(tmp_path, **overrides))]

    def without(*names: str) -> list[str]:
        return [title for title in ALL if title not in names]

    assert titles() == titles(method__loss="psl") == ALL
    scores = {"data__likelihood": "scores"}
    assert titles(**scores) == without("merge")
    for key, value in (
        ("method__num_ignore", "0"),
        ("method__num_ignore", "all"),
        ("method__draw_weights", "uniform"),
        ("method__loss", "ce_ignoring"),
    ):
        assert titles(**scores, **{key: value}) == without("score", "merge")
    dataset = str(tmp_path / "root/dataset")
    assert titles(paths__merged=dataset) == without("score", "merge")
    clip = titles(paths__merged=dataset, evaluation__predictor="clip")
    assert clip == [*without("merge")[:-2], "evaluate test clip", "report", "export"]
    assert titles(evaluation__split="val") == [
        title.replace("test", "val") for title in without("evaluate val")
    ]


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("clean__min_side", "10", {"clean"}),
        ("pack__jpeg_quality", "90", {"pack"}),
        ("pack__block_bytes", "2048", {"pack", "merge"}),
        ("scoring__templates", "['{attribute} {object}']", {"score"}),
        ("scoring__temperature", "0.02", {"score", "merge", "train"}),
        ("data__image_size", "64", {"train"}),
        ("method__num_ignore", "10", {"train"}),
        ("training__epochs", "13", {"train"}),
        ("evaluation__top_k", "5",
         {"evaluate val", "evaluate test", "evaluate test constant", "report"}),
        ("evaluation__curves", "2", {"report"}),
        ("export__min_annotated", "5", {"export"}),
        ("paths__export", "elsewhere", {"export"}),
        ("pack__workers", "3", set()),
        ("scoring__actors", "3", set()),
        ("scoring__device", "cuda", set()),
        ("data__threads", "3", set()),
        ("data__prefetch_steps", "9", set()),
        ("training__threads", "3", set()),
        ("training__log_steps", "1", set()),
        ("observability__metrics", "false", set()),
        ("paths__cache", "elsewhere", set()),
        ("supervise__restarts", "0", set()),
    ],
)  # fmt: skip
def test_a_setting_runs_the_stages_that_read_it(
    finished: Path, key: str, value: str, stages: set[str]
) -> None:
    found = to_do(resolve(finished, **{key: value}))
    assert set(found) == stages
    if key != "paths__export":
        assert all(key.replace("__", ".") in why for why in found.values())


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("a.json", {"clean"}),
        ("photos.zip", {"pack"}),
        ("photos/new.jpg", {"pack"}),
        ("clip.safetensors", {"score"}),
        ("resnet.safetensors", {"train"}),
        ("truth.parquet", {"evaluate val", "evaluate test", "evaluate test constant", "report"}),
        ("root/instances/clean.json", {"pack"}),
        ("root/dataset/dataset.json", set(ALL) - {"clean", "pack", "train"}),
        ("root/scores/scores.json", {"merge"}),
        ("root/merged/dataset.json", {"train", "report"}),
        ("root/run/best/model.json", {"evaluate val", "evaluate test", "export"}),
        ("root/run/evaluation/val-model/result.json", {"export"}),
        ("root/run/evaluation/test-constant/result.json", {"report"}),
    ],
)
def test_a_file_runs_the_stages_that_read_it(finished: Path, file: str, stages: set[str]) -> None:
    config = resolve(finished)
    assert to_do(config) == {}
    for path in finished.rglob("*"):  # times alone say nothing, where contents are compared
        if path.suffix != ".zip":
            os.utime(path, ns=(1, 1))
    assert to_do(config) == {}
    (finished / file).write_text("other")
    found = to_do(config)
    assert set(found) == stages
    shown = file.removesuffix("/new.jpg")
    assert all(f"{finished}/{shown}" in why for why in found.values())


@pytest.mark.parametrize("number", range(len(ALL)))
def test_what_is_gone_or_failed_runs_again(finished: Path, number: int) -> None:
    config = resolve(finished)
    stage = stages_of(config)[number]
    record, output = Path(*stage.record), Path(*stage.output)
    text = record.read_text()
    record.write_text(json.dumps({"code": 74, "reason": "disk full"}))
    assert to_do(config)[stage.title] == "last time: disk full"
    record.unlink()
    assert to_do(config)[stage.title] == "no result yet"
    record.write_text(text)
    output.unlink()
    assert str(output) in to_do(config)[stage.title]


def test_training_goes_on_only_with_the_settings_that_it_began_with(finished: Path) -> None:
    def action(**overrides: str) -> str:
        stages = stages_of(resolve(finished, **overrides))
        return decide(stages[ALL.index("train")]).action

    assert action() == "skip"
    assert action(training__epochs="20") == "run"
    assert action(training__epochs="20", data__threads="1") == "run"
    assert action(training__epochs="5") == action(training__lr_new="1e-4") == "stop"
    assert action(training__epochs="20", method__margin="0.1") == "stop"
    assert action(training__epochs="20", training__schedule="cosine") == "stop"

    # Not finished: train wrote its settings when it began.
    (finished / "root/run/train.result.json").unlink()
    assert action(training__lr_new="1e-4") == "run"  # by a version that wrote none
    began = resolve(finished, training__lr_new="1e-4").model_dump(mode="json")
    (finished / "root/run/config.yaml").write_text(yaml.safe_dump(began))
    assert action(training__lr_new="1e-4") == "run"
    assert action() == "stop"
    (finished / "root/run/checkpoints/00000010/COMPLETE").unlink()
    assert action() == "run"


def test_replace_is_passed_on_and_training_starts_over(finished: Path) -> None:
    config = resolve(finished, training__seed="5")
    stages = {stage.title: stage for stage in stages_of(config, replace=True)}
    assert [title for title, one in stages.items() if "--replace" in one.words] == [
        *("clean", "pack", "score", "merge", "train")
    ]
    assert decide(stages["train"]).action == "redo"
    assert decide(stages["pack"]).action == "skip"
    assert all("--replace" not in stage.words for stage in stages_of(config))


def test_settings_newer_than_the_record_count_with_their_default() -> None:
    old = {"training.epochs": 8, "paths.run/x": "a"}
    assert changed(old, {**old, "method.margin": 0.05}) == []
    assert changed(old, {**old, "method.margin": 0.1}) == ["method.margin"]
    assert changed({**old, "training.gone": 1}, old) == []
    assert changed(old, {"training.epochs": 8}) == ["paths.run/x"]
    assert changed({**old, "--like": "root"}, old) == ["--like"]


def test_a_plan_names_what_changed(finished: Path) -> None:
    config = resolve(finished, training__epochs="13", export__min_annotated="5")
    stages = stages_of(config)
    lines = plan_table(stages, plan(stages)).splitlines()
    after = "finished; to be seen after train"
    assert lines == [
        "clean                   skip   finished",
        "pack                    skip   finished",
        "score                   skip   finished",
        "merge                   skip   finished",
        "train                   run    changed: training.epochs 12 -> 13",
        f"evaluate val            maybe  {after}",
        f"evaluate test           maybe  {after}",
        "evaluate test constant  skip   finished",
        f"report                  maybe  {after}, evaluate val, evaluate test",
        "export                  run    changed: export.min_annotated 10 -> 5",
    ]


def test_rejected_instances_are_tried_again_on_demand(finished: Path) -> None:
    config = resolve(finished)
    stages = stages_of(config, retry_rejected=True)
    assert {s.title for s in stages if "--retry-rejected" in s.words} == {"pack", "score", "merge"}
    assert [(d.action, d.why) for d in plan(stages)[:4]] == [
        ("skip", "finished"),
        ("run", "--retry-rejected: rejected instances are tried again"),
        ("maybe", "finished; to be seen after pack"),
        ("maybe", "finished; to be seen after pack, score"),
    ]
    # Without the flag new photos make pack run, which leaves finished shards: the plan says so.
    (finished / "photos/2.jpg").write_text("2")
    record = Path(*stages[1].record)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"counts": {"rejected": 3}}))
    assert to_do(config)["pack"].endswith("; 3 rejected instances stay so without --retry-rejected")


def test_the_keys_that_do_not_count_exist() -> None:
    assert set(_keys(Config())) >= EXECUTION


def _keys(config: Config) -> list[str]:
    return [f"{section}.{name}" for section, keys in config for name, _ in keys]


def test_from_and_to(tmp_path: Path) -> None:
    stages = stages_of(resolve(tmp_path, data__likelihood="scores"))

    def titles(first: str | None, last: str | None) -> list[str]:
        return [stage.title for stage in select(stages, first=first, last=last)]

    assert titles(None, "pack") == ["clean", "pack"]
    assert titles("evaluate", "evaluate") == ALL[5:8]
    assert titles("report", None) == ["report", "export"]
    for first, last, message in (
        ("merge", None, "--from merge is not needed by this configuration"),
        (None, "packs", "--to packs is no stage; .*its stages|its stages: clean, pack"),
        ("train", "pack", "--from train comes after --to pack"),
    ):
        with pytest.raises(UsageError, match=message):
            titles(first, last)


def test_stages_get_the_settings_alone() -> None:
    given = "--config c.yaml --from train --plan --training.epochs=3 --to=report --ranks 2 --json f"
    expected = ["--config", "c.yaml", "--training.epochs=3", "--a.b", "--to"]
    assert without_flags([*given.split(), "--a.b", "--to"], OWN_FLAGS) == expected


def test_ranks_by_visible_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_count() == 0
    program.write_text("#!/bin/sh\necho 'GPU 0: H200'\necho '  MIG 1g'\necho 'GPU 1: H200'\n")
    program.chmod(0o755)
    assert gpu_count() == 2
    for visible, count in (("", 0), ("-1", 0), ("3", 1), ("0,2,5", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu_count() == count
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert gpu_count() == 0


def test_the_closing_table(tmp_path: Path) -> None:
    group = {"name": "overall", "num_classes": 40, "mAP": 0.25}
    rare = {"name": "rare", "num_classes": 0, "mAP": None}
    result = {"split": "test", "groups": [group, rare], "truth": None}
    better = {**result, "groups": [{**group, "mAP": 0.5}, rare]}
    assert result_table(result, better) == [
        "test split              attributes    constant     trained   mAP, %",
        "overall                         40        25.0        50.0",
        "rare                             0           -           -",
    ]
    complete = {"truth": {"groups": [group]}}
    assert result_table(result | complete, better | complete)[-1].startswith("complete labels")
    config = resolve(tmp_path)
    for split, found in (("test-constant", result), ("test-model", better)):
        folder = tmp_path / "root/run/evaluation" / split
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(found))
    lines = closing(config, {"evaluate", "report"})
    assert lines == [*result_table(result, better), "", f"page: {config.paths.run}/report.html"]
    assert closing(config, {"train"}) == []  # the results may be of the model before


def test_the_remarks_of_all_stages_come_last(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve(finished)
    stages = stages_of(config)
    assert stage_remarks(stages) == []
    say_remarks(stages)
    assert capsys.readouterr().out == ""  # nothing where nothing was remarked

    def remarked(title: str, *texts: object) -> None:
        (stage,) = [one for one in stages if one.title == title]
        path = Path(*stage.record)
        warnings = [{"key": "k", "text": text} for text in texts]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": warnings}))

    imported = finished / "root/imported/import.result.json"
    imported.parent.mkdir()
    imported.write_text('{"warnings": [{"key": "k", "text": "3 rows rejected"}]}')
    remarked("clean", "a half is dropped")
    remarked("evaluate val", "mAP is undefined")
    remarked("evaluate test", "mAP is undefined", "and so is mA")
    assert stage_remarks(stages) == [
        ("import", ["3 rows rejected"]),
        ("clean", ["a half is dropped"]),
        ("evaluate val", ["mAP is undefined"]),
        ("evaluate test", ["and so is mA"]),
    ]
    say_remarks(stages)
    assert capsys.readouterr().out.splitlines() == [
        "import: warning: 3 rows rejected",
        "clean: warning: a half is dropped",
        "evaluate val: warning: mAP is undefined",
        "evaluate test: warning: and so is mA",
    ]


@pytest.mark.parametrize(
    "damaged", ["{", "[]", '{"warnings": 3}', '{"warnings": [3, {"text": {}}]}']
)
def test_a_damaged_record_ends_no_run(finished: Path, damaged: str) -> None:
    stages = stages_of(resolve(finished))
    Path(*stages[0].record).write_text(damaged)
    assert stage_remarks(stages) == []


def test_programs_record_their_inputs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_small_vaw(tmp_path, images={"train": 4, "val": 1, "test": 1})
    words = ["--config", str(config), "--to", "clean"]
    assert main([*words, "--plan"]) == 0
    assert not (tmp_path / "instances").exists() and not (tmp_path / "run").exists()
    assert main(words) == 0
    shown = capfd.readouterr().out
    assert "=== clean: no result yet\n$ vlal clean --config" in shown
    record = tmp_path / "instances/clean.result.json"
    inputs = json.loads(record.read_text())["inputs"]
    assert inputs["clean.min_side"] == 10 and len(inputs["clean.annotations"]["val"][0]) == 64
    assert "clean.wordnet_dir" not in inputs

    before = record.stat().st_mtime_ns
    assert main(words) == 0
    assert record.stat().st_mtime_ns == before and "clean: finished\n" in capfd.readouterr().out
    # A finished root is never edited; the record of the failed attempt takes the old one's place.
    assert main([*words, "--clean.min_side", "33"]) == 65
    shown = capfd.readouterr()
    assert "=== clean: changed: clean.min_side 10.0 -> 33.0" in shown.out
    assert "run: error: clean ended with code 65" in shown.err and "--paths.root" in shown.err
    assert main([*words, "--plan"]) == 0
    assert "clean  run    last time: " in capfd.readouterr().out


def test_a_killed_program_leaves_no_record(tmp_path: Path) -> None:
    record = tmp_path / "run/evaluation/test-model/evaluate.result.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"code": 0}')
    config = write_small_vaw(tmp_path)
    assert run_program(EVALUATE, ["--config", str(config)]) != 0
    assert json.loads(record.read_text())["code"] != 0
