"""The README's and the docs' examples run: Python blocks, commands, records, configurations."""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from PIL import Image, ImageDraw

from tests.fixtures.tiny_dataset import VOCABULARY
from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from tests.release.test_saved_model import INFO, tiny_model
from vlal_dist.config.load import INSTALLED, load_config, parse_command_line
from vlal_dist.data.format.dataset import open_dataset
from vlal_dist.errors import ConfigError, UsageError
from vlal_dist.program import COMMANDS, run_command
from vlal_dist.release.model import WEIGHTS, ExportInfo, write_export
from vlal_dist.release.saved_model import encode_weights
from vlal_dist.storage.store import open_store
from vlal_dist.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("clusters/*.md")])


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Words of each `vlal ...` command, in blocks and within lines, comments left out."""
    joined = text.replace("\\\n", " ")
    inline = re.findall(r"`(vlal [^`]+)`", joined.replace("\n", " "))
    for line in [*re.findall(r"^ *(vlal .+)$", joined, re.MULTILINE), *inline]:
        for command in line.split(" && "):
            yield shlex.split(command, comments=True)[1:]


def parse(command: str, arguments: list[str]) -> None:
    """Parse a command's flags and keys, without running it.

    Raises:
        ConfigError, UsageError: an unknown key, a value out of range, or an unknown flag.
    """
    module = importlib.import_module(COMMANDS[command][0])
    if command == "experiments":
        flags = module.PROGRAMS[arguments.pop(0)].flags
    elif command == "import":
        if arguments[0] == "--help":
            return
        flags = module.program_of(arguments.pop(0)).flags
    else:
        flags = module.OWN_FLAGS if command == "run" else module.PROGRAM.flags
    if arguments != ["--help"]:
        parse_command_line(arguments, flags=flags, sections=())


def test_it_is_short_and_fits() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 100] == []


def write_model_and_photo(folder: Path, export: str, *, object_name: str) -> Vocabulary:
    """Write an exported model that knows an object, and `photo.jpg`; returns the model's names."""
    vocabulary = replace(VOCABULARY, objects=(object_name, *VOCABULARY.objects[1:]))
    info = ExportInfo(
        replace(INFO, vocabulary_digest=vocabulary.digest), vocabulary, "tiny", box_expansion=0.0
    )
    store = open_store(str(folder / export))
    write_export(store, info, {WEIGHTS: encode_weights(tiny_model())}, card="", remarks={})
    photo = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(photo).ellipse((60, 40, 220, 200), fill="red")
    photo.save(folder / "photo.jpg")
    return vocabulary


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = write_model_and_photo(tmp_path, "runs/demo/export", object_name="mug")
    monkeypatch.chdir(tmp_path)
    loss, model = blocks("python")
    scope: dict[str, Any] = {}
    exec(loss, scope)
    gradient = scope["logits"].grad
    assert gradient.shape == (4, 6) and gradient[:, 0].max() < 0 < gradient[:, 1].min()
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(model, scope)
    found = dict(line.split() for line in shown.getvalue().splitlines())
    assert len(found) == 5 and set(found) <= set(vocabulary.attributes)
    assert all(0 <= float(value) <= 1 for value in found.values())


def test_the_page_of_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model_and_photo(tmp_path, "runs/vaw/export", object_name="dog")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python", (ROOT / "docs/models.md").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {}
    exec(block, scope)
    assert len(scope["found"]) == 5


def test_the_library_page_runs(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/own").mkdir(parents=True)
    (tmp_path / "runs/own/merged").symlink_to(small / "merged")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in blocks("python", (ROOT / "docs/library.md").read_text(encoding="utf-8")):
        exec(block, scope)
    assert 0 < float(capsys.readouterr().out.split()[0]) < 1
    # 72 samples: four batches of 16 an epoch, the incomplete one dropped.
    assert scope["batch"]["position"].tolist() == [1, 64]
    assert scope["logits"].grad.abs().sum() > 0


def test_its_make_targets_exist() -> None:
    targets = re.findall(r"\bmake ([a-z-]+)", README)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAW", "FOLDER")
    template = INSTALLED / "own.yaml"
    for name in ("own.yaml", "new.yaml", "runs/own/imported/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(template.read_text())
    for command, *arguments in commands(page.read_text(encoding="utf-8")):
        usage = command.isupper() or any("[" in word or "|" in word for word in arguments)
        if usage or command.startswith("--"):
            continue
        assert command in COMMANDS, command
        if arguments and command not in ("demo", "supervise"):
            parse(command, arguments)


def test_the_test_of_commands_can_fail() -> None:
    with pytest.raises(UsageError):
        parse("pack", ["--plan", "--nothing", "1"])
    with pytest.raises(ConfigError):
        parse("pack", ["--pack.nothing", "1"])


PAGE = (ROOT / "docs/your-data.md").read_text(encoding="utf-8")


def write_own_data(folder: Path, *, photos: int, all_in: str = "own.json") -> set[str]:
    """`own.yaml` as shipped, and records as on the page; returns the attributes.

    Every second photo is red, with the labels of the page's record exchanged in the others.
    """
    (text,) = blocks("json", PAGE)
    (record,) = json.loads(text)
    labels = record["positive_attributes"], record["negative_attributes"]
    (folder / "photos").mkdir(exist_ok=True)
    (folder / "own.yaml").write_text((INSTALLED / "own.yaml").read_text())
    records = []
    for number in range(photos):
        name = f"{Path(all_in).stem}{number}"
        positive, negative = labels if number % 2 else labels[::-1]
        records.append(
            {
                **record,
                "image_id": name,
                "instance_id": f"{name}-1",
                "positive_attributes": positive,
                "negative_attributes": negative,
            }
        )
        color = "red" if number % 2 else "white"
        Image.new("RGB", (200, 150), color).save(folder / f"photos/{name}.jpg")
    (folder / all_in).write_text(json.dumps(records))
    return {*labels[0], *labels[1]}


def test_own_data_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attributes = write_own_data(tmp_path, photos=40)
    assert blocks("yaml", PAGE)[0] == (tmp_path / "own.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    run_all(Path("own.yaml"), ["clean", "pack"])
    dataset = open_dataset("runs/own/dataset", cache=tmp_path / "cache")
    assert dataset.name == "own" and dataset.vocabulary.objects == ("mug",)
    assert set(dataset.vocabulary.attributes) == attributes
    samples = [dataset.manifest["splits"][name]["samples"] for name in ("train", "val", "test")]
    assert sum(samples) == 40 and min(samples) > 0 and samples[0] > 25
    assert run("inspect", Path("own.yaml")) == 0


def test_every_configuration_on_the_page_is_valid(tmp_path: Path) -> None:
    shown = blocks("yaml", PAGE)
    assert len(shown) == 4
    for text in shown:
        (tmp_path / "shown.yaml").write_text(text)
        load_config(tmp_path / "shown.yaml", {})


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.timeout(900)
def test_own_data_to_a_trained_model_and_held_out_data(tmp_path: Path) -> None:
    from tests.scoring.conftest import make_tiny_model

    write_own_data(tmp_path, photos=40)
    write_own_data(tmp_path, photos=20, all_in="new.json")
    (tmp_path / "new.yaml").write_text(blocks("yaml", PAGE)[-1])
    clip = make_tiny_model(tmp_path / "clip", seed=7)
    small = "--training.epochs 1 --training.batch_size 16 --model.depth 18 --model.width 8"
    small += " --data.image_size 64 --evaluation.batch_size 16"
    by_clip = (
        f" --scoring.model tiny --scoring.model_config_dir {clip.folder} --scoring.use_ray false"
        f" --scoring.weights {clip.weights} --scoring.device cpu"
    )
    without = next(words for words in commands(PAGE) if "--method.draw_weights" in words)
    held_out = [words for words in commands(PAGE) if "new.yaml" in words or "--like" in words]
    held_out += [words for words in commands(PAGE) if "runs/new/dataset" in words]
    evaluate = dict(zip(("clean", "pack", "evaluate"), held_out, strict=True))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    for words in (
        ["run", "--config", "own.yaml", "--to", "train", *small.split(), *by_clip.split()],
        [*without, "--to", "train", *small.split(), "--paths.run", "runs/own/without"],
        *evaluate.values(),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "vlal_dist", *words],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    run_root = tmp_path / "runs/own/run"
    folders = {path.parent.name for path in run_root.glob("evaluation/*/result.json")}
    (other,) = (name for name in folders if name.startswith("test-model@new-"))
    assert (
        json.loads((run_root / f"evaluation/{other}/result.json").read_text())["num_samples"] == 20
    )
    assert (tmp_path / "runs/own/without/best/model.json").is_file()


def test_tables_as_documented(tmp_path: Path) -> None:
    page = (ROOT / "docs/your-data.md").read_text(encoding="utf-8")
    tables = blocks("csv", page)
    record = {**json.loads(blocks("json", page)[0])[0], "image_id": "IMG_0042.jpg"}
    record["instance_id"] = "IMG_0042.jpg#0"
    assert len(tables) == 3
    for number, text in enumerate(tables):
        path, root = tmp_path / f"{number}.csv", tmp_path / str(number)
        path.write_text(text)
        words = ["table", "--importing.inputs", str(path), "--paths.root", str(root)]
        assert run_command("import", words) == 0
        rows = pyarrow.parquet.read_table(root / "imported/all.parquet").to_pylist()
        assert rows == [record]


def test_blanks_between_cells_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = blocks("python", PAGE)
    monkeypatch.chdir(tmp_path)
    Path("list_attr.txt").write_text("2\nRed  Tall \n1.jpg  1 -1\n2.jpg -1 0\n")
    exec(snippet, {})
    assert run_command("import", ["table", "--importing.inputs", "labels.csv"]) == 65  # which -1?
    words = ["table", "--importing.inputs", "labels.csv", "--importing.numbers", "1/-1/0"]
    assert run_command("import", words) == 0
    rows = pyarrow.parquet.read_table("runs/own/imported/all.parquet").to_pylist()
    labels = [(r["image_id"], r["positive_attributes"], r["negative_attributes"]) for r in rows]
    assert labels == [("1.jpg", ["Red"], ["Tall"]), ("2.jpg", [], ["Red"])]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_vaw_in_six_commands(tmp_path: Path) -> None:
    from tests.scoring.conftest import make_tiny_model

    config = write_small_vaw(tmp_path)
    clip = make_tiny_model(tmp_path / "clip", seed=7)
    values = yaml.safe_load(config.read_text())
    values["scoring"] = {
        "model": clip.name,
        "model_config_dir": str(clip.folder),
        "device": "cpu",
        "batch_size": 8,
        "decode_threads": 1,
        "use_ray": False,
    }
    config.write_text(yaml.safe_dump(values))
    (block,) = (block for block in blocks("sh") if "VAW" in block)
    # Weights that would be downloaded, and from-scratch training.
    text = block.replace("--scoring.weights openai", f"--scoring.weights {clip.weights}")
    text = text.replace("--model.weights imagenet", "")
    listed = list(commands(text))
    assert [words[0] for words in listed] == [
        *("clean", "pack", "score", "merge", "train", "evaluate")
    ]
    environment = {
        **os.environ,
        "VLAL_CONFIG": str(config),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    for words in listed:
        done = subprocess.run(
            [sys.executable, "-m", "vlal_dist", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    result = json.loads((tmp_path / "run/evaluation/test-model/result.json").read_text())
    assert result["num_samples"] == 24 and 0 < result["groups"][0]["mAP"] <= 1
