"""The distributions: what wheel and sdist hold, what the core installs, and that it is enough.

`core` is a virtual environment with the wheel and only those packages of this environment that the
wheel's requirements without extras lead to; a package that only an extra brings is absent there.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import vlal_dist
from tests.fixtures.tiny_dataset import VOCABULARY, write_dataset
from tests.fixtures.tiny_vaw import write_small_vaw
from tests.release.test_saved_model import INFO, tiny_model
from vlal_dist import errors
from vlal_dist.release.model import WEIGHTS, ExportInfo, load_model, write_export
from vlal_dist.release.saved_model import encode_weights, write_model
from vlal_dist.storage.store import open_store

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff",
           "SECURITY.md", "constraints.txt", "configs", "vlal_dist", "shard_tools")  # fmt: skip
EXTRAS = {
    "score": {"ray", "open-clip-torch", "timm", "huggingface-hub"},
    "hf": {"transformers", "sentencepiece"},
    "train": {"deepspeed", "tensorboard", "grpcio"},
    "s3": {"boto3", "botocore", "urllib3"},
    "onnx": {"onnx", "onnxruntime", "onnxscript"},
    "trackers": {"mlflow-skinny", "wandb"},
}
"""What the core must not lead to; of each extra, the first and what comes with it."""
NEEDS_EXTRA = {
    "vlal_dist.demo.train_clip",
    "vlal_dist.observability.event_files",
    "vlal_dist.storage.s3",
    "vlal_dist.storage.s3_client",
    "vlal_dist.storage.s3_lease",
    "vlal_dist.storage.s3_read",
}
"""Modules that import an extra's package at their top; the others import in the core."""


@dataclass(frozen=True)
class Distributions:
    """Wheel and sdist, built once.

    Attributes:
        wheel, sdist: their files.
        names: of the wheel's files.
        metadata: of the wheel.
    """

    wheel: Path
    sdist: Path
    names: frozenset[str]
    metadata: Message


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command without this process's PYTHONPATH."""
    names = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, "PYTHONNOUSERSITE": "1", **(env or {})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def build_wheel(source: Path, out: Path) -> Path:
    """`pip wheel` without network: the build tools are this environment's."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "--wheel-dir", out, source, cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:  # a copy, so that no build folder appears in, or is taken from, this one
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    (folder / "sdist").mkdir()
    backend = "from setuptools import build_meta; build_meta.build_sdist('../sdist')"
    run(sys.executable, "-c", backend, cwd=source)
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    wheel = build_wheel(source, folder / "wheel")
    with zipfile.ZipFile(wheel) as files:
        names = frozenset(files.namelist())
        (text,) = (files.read(name).decode() for name in names if name.endswith("/METADATA"))
    return Distributions(wheel, sdist, names, Parser().parsestr(text))


def closure(message: Message, *extras: str) -> set[str]:
    """Names of all distributions that a wheel with these extras leads to, here.

    Requirements of a distribution that is not installed here are not followed.
    """
    found: set[tuple[str, str]] = set()
    stack = [Requirement(f"vlal-dist[{','.join(extras)}]")]
    while stack:
        wanted = stack.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for known, extra in found if known == name}:
            found.add((name, extra))
            for one in map(Requirement, requires(name, message)):
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    stack.append(one)
    return {name for name, _ in found} - {"vlal-dist"}


def requires(name: str, message: Message) -> list[str]:
    """Requirements of a distribution; of our own, those of the wheel built just now."""
    if name == "vlal-dist":
        return message.get_all("Requires-Dist") or []
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def test_the_wheel_claims_two_packages(built: Distributions) -> None:
    tops = {name.split("/")[0] for name in built.names}
    assert tops == {"vlal_dist", "shard_tools", f"vlal_dist-{vlal_dist.__version__}.dist-info"}
    assert not any("test" in Path(name).parts for name in built.names)
    assert not any(re.search(r"/tests?/|__pycache__|\.pyc$|\.so$", name) for name in built.names)


def test_the_wheel_holds_every_file_of_the_packages(built: Distributions) -> None:
    """Modules, py.typed, templates, kernel sources, the demo's JSON and the configurations."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in ("vlal_dist", "shard_tools")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    expected |= {f"vlal_dist/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    held = {name for name in built.names if ".dist-info/" not in name}
    assert held == expected
    for kind in ("py.typed", "kernels/src/cpu.cpp", "reporting/templates/page.html"):
        assert f"vlal_dist/{kind}" in held
    assert {"vlal_dist/configs/vaw.yaml", "vlal_dist/demo/merge_table.json"} <= held
    assert {name.rsplit("/", 1)[1] for name in built.names - held} == {
        "METADATA", "RECORD", "WHEEL", "LICENSE", "entry_points.txt", "top_level.txt"
    }  # fmt: skip


def test_no_file_of_the_wheel_names_this_machine(built: Distributions) -> None:
    folders = {str(ROOT), str(built.wheel.parent), str(Path.home()), sys.prefix}
    with zipfile.ZipFile(built.wheel) as files:
        texts = {name: files.read(name).decode() for name in files.namelist()}
    bad = [(name, one) for name, text in texts.items() for one in folders if f"{one}/" in text]
    assert bad == []


def test_metadata(built: Distributions) -> None:
    fields = built.metadata
    assert (fields["Name"], fields["Version"]) == ("vlal-dist", vlal_dist.__version__)
    assert fields["License-Expression"] == "Apache-2.0" and fields["License-File"] == "LICENSE"
    assert fields["Description-Content-Type"] == "text/markdown" and fields["Author"]
    assert "Paper, https://arxiv.org/abs/2312.07009" in (fields.get_all("Project-URL") or [])
    assert set(fields.get_all("Provides-Extra") or []) == {*EXTRAS, "all", "dev"}
    classifiers = fields.get_all("Classifier") or []
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(classifiers)
    oldest = min(
        int(found.group(1))
        for found in (re.fullmatch(r".*Python :: 3\.(\d+)", one) for one in classifiers)
        if found
    )
    assert fields["Requires-Python"] == f">=3.{oldest}"
    with zipfile.ZipFile(built.wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("/entry_points.txt"))
        assert files.read(name).decode().split("\n")[:2] == [
            "[console_scripts]", "vlal = vlal_dist.__main__:main"
        ]  # fmt: skip


def test_twine_accepts_both(built: Distributions) -> None:
    command = (sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist)
    assert run(*command, cwd=built.wheel.parent).stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built: Distributions, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as files:
        files.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "constraints.txt").is_file() and not (source / "tests").exists()
    again = build_wheel(source, tmp_path / "wheel")
    assert again.name == built.wheel.name
    with zipfile.ZipFile(again) as new, zipfile.ZipFile(built.wheel) as old:
        assert set(new.namelist()) == built.names
        assert all(new.read(name) == old.read(name) for name in built.names)


def test_the_core_leads_to_no_extra(built: Distributions) -> None:
    core = closure(built.metadata)
    assert {"torch", "torchvision", "numpy", "pydantic-core"} <= core
    assert core & {"transformers"}.union(*EXTRAS.values()) == set()


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_extra_leads_to_its_packages(built: Distributions, extra: str) -> None:
    found = closure(built.metadata, extra)
    assert EXTRAS[extra] <= found
    for other in set(EXTRAS) - {extra}:
        direct = {canonicalize_name(one.name) for one in declared(built.metadata, other)}
        assert direct and not direct & found


def declared(message: Message, extra: str) -> list[Requirement]:
    """Requirements of one extra alone."""
    found = map(Requirement, requires("vlal-dist", message))
    return [one for one in found if one.marker and f'extra == "{extra}"' in str(one.marker)]


def test_all_and_dev_hold_the_extras(built: Distributions) -> None:
    (everything,) = declared(built.metadata, "all")
    assert everything.name == "vlal-dist" and everything.extras == set(EXTRAS)
    assert any(one.extras == {"all"} for one in declared(built.metadata, "dev"))


def test_one_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", changes, re.MULTILINE)
    assert newest is not None and newest.group(1) == vlal_dist.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["date-released"]) == newest.groups()


def test_every_dependency_is_pinned(built: Distributions) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    found = closure(built.metadata, "dev")
    assert len(found) > 100 and found - pinned == set()


# What follows runs in the core alone, outside of the checkout.


@pytest.fixture(scope="session")
def core(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of the core's environment."""
    folder = tmp_path_factory.mktemp("core")
    links = folder / "links"
    links.mkdir()
    for name in closure(built.metadata):
        distribution = metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (links / part).exists():
                (links / part).symlink_to(distribution.locate_file(part).resolve())
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "links.pth").write_text(f"{links}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index")
    run(*pip, "--no-deps", "--no-compile", built.wheel, cwd=folder)
    return python.parent


def in_core(core: Path, lines: str, cwd: Path, *arguments: str | Path) -> str:
    """Run Python lines there; what they print."""
    return run(core / "python", "-c", lines, *arguments, cwd=cwd).stdout


@pytest.mark.slow
def test_modules_import_in_the_core(core: Path, tmp_path: Path) -> None:
    """All but `NEEDS_EXTRA`, and the package itself without torch."""
    lines = """
import importlib, json, pkgutil, sys
import vlal_dist, shard_tools
heavy = sorted({"torch", "numpy", "pydantic"} & set(sys.modules))
absent = {}
for package in (vlal_dist, shard_tools):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                absent[found.name] = error.name
print(json.dumps([vlal_dist.__file__, heavy, absent]))
"""
    place, heavy, absent = json.loads(in_core(core, lines, tmp_path))
    assert place.startswith(str(core.parent)) and heavy == []
    assert set(absent) == NEEDS_EXTRA
    assert {name.split(".")[0] for name in absent.values()} == {
        "botocore", "open_clip", "tensorboard"
    }  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `export/`, a random model, and `photos/`."""
    folder = tmp_path_factory.mktemp("export")
    info = ExportInfo(model=INFO, vocabulary=VOCABULARY, dataset="tiny", box_expansion=0.0)
    weights = {WEIGHTS: encode_weights(tiny_model())}
    write_export(open_store(str(folder / "export")), info, weights, card="", remarks={})
    (folder / "photos").mkdir()
    Image.radial_gradient("L").convert("RGB").save(folder / "photos/one.png")
    return folder


@pytest.mark.slow
def test_the_command_in_the_core(core: Path, export: Path, tmp_path: Path) -> None:
    """Clean, pack, verify and inspect; evaluate, export and report; predict; help."""
    data = write_small_vaw(tmp_path / "data", images={"train": 6, "val": 3, "test": 3})
    vlal = core / "vlal"
    assert run(vlal, "--version", cwd=tmp_path).stdout == f"vlal {vlal_dist.__version__}\n"
    assert "predict" in run(vlal, "--help", cwd=tmp_path).stdout
    for command in ("clean", "pack", "verify", "inspect"):
        done = run(vlal, command, "--config", data, cwd=tmp_path)
        assert "WARNING" not in done.stderr and f"{command}: done" in done.stdout

    config = tmp_path / "config.yaml"
    paths = {"dataset": str(write_dataset(tmp_path / "tiny")), "run": str(tmp_path / "run")}
    paths |= {name: str(tmp_path / name) for name in ("export", "cache")}
    config.write_text(json.dumps({"paths": paths, "data": {"validation_split": "test"}}))
    write_model(open_store(paths["run"]), "best", encode_weights(tiny_model()), INFO)
    for command in ("evaluate", "report", "export"):
        run(vlal, command, "--config", config, cwd=tmp_path)
    flags = ("--predict.images", export / "photos", "--predict.object", "ball")
    run(vlal, "predict", "--predict.model", paths["export"], *flags, cwd=tmp_path)
    (row,) = (tmp_path / "runs/predictions.jsonl").read_text().splitlines()
    (found,) = [json.loads(row)]
    model = load_model(paths["export"])
    expected = model(export / "photos/one.png", "ball", top_k=1)[0]
    assert found["attributes"][0]["name"] == expected.name


@pytest.mark.slow
def test_what_needs_an_extra_names_it(core: Path, tmp_path: Path) -> None:
    """In one line, with code 64, and before any work."""
    dataset = write_dataset(tmp_path / "tiny")
    config = tmp_path / "config.yaml"
    paths = {"dataset": str(dataset), "scores": str(tmp_path / "scores")}
    config.write_text(json.dumps({"paths": paths}))
    for words, extras in (
        (("demo",), "score"),
        (("score", "--config", config), "score"),
        (("experiments", "table1", "--config", config), "train"),
        (("verify", "--paths.dataset", "s3://bucket/prefix"), "s3"),
    ):
        done = run(core / "vlal", *words, cwd=tmp_path, code=64)
        (line,) = [line for line in done.stderr.splitlines() if " error: " in line]
        assert line.endswith(f" not installed; run: pip install 'vlal-dist[{extras}]'")
        assert "Traceback" not in done.stderr
    for module, extra in errors.EXTRAS.items():
        names = metadata.packages_distributions()[module]
        assert {canonicalize_name(name) for name in names} & EXTRAS[extra]


@pytest.mark.slow
def test_the_library_in_the_core(core: Path, export: Path, tmp_path: Path) -> None:
    lines = """
import sys
import vlal_dist as vlal
model = vlal.load_model(sys.argv[1])
print([(one.name, one.probability) for one in model(sys.argv[2], "ball", top_k=2)])

import torch
labels = torch.tensor([[1, -1, 0], [-1, 1, 0]])
logits = torch.zeros(2, 3, requires_grad=True)
sets = vlal.FeasibleSets.from_labels(torch.tensor([0, 1]), labels)
likelihood = vlal.clip_likelihood(
    torch.eye(2, 8), torch.eye(3, 8), feasible=sets, object_id=torch.tensor([0, 1])
)
loss = vlal.SelectiveLoss(1, feasible=sets)
value = loss(logits, labels, object_id=torch.tensor([0, 1]), likelihood=likelihood)
value.backward()
assert logits.grad is not None and logits.grad.abs().sum() > 0
print(vlal.evaluate(torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.9, 0.2]]), labels).mAP)
"""
    photo = export / "photos/one.png"
    expected = [(a.name, a.probability) for a in load_model(export / "export")(photo, "ball")[:2]]
    found, score = in_core(core, lines, tmp_path, export / "export", photo).splitlines()
    assert ast.literal_eval(found) == [(name, pytest.approx(p)) for name, p in expected]
    assert float(score) == 1.0


CONSUMERS = {
    "FeasibleSets": """
feasible: vlal.FeasibleSets = vlal.FeasibleSets.from_labels(object_id, labels)
""",
    "SelectiveLoss": """
loss = vlal.SelectiveLoss(num_ignore=30, gammas=(1, 2, 4, 7), draw="random", reduction="mean")
assert_type(loss.reduction, Literal["mean", "sum", "none"])
""",
    "ShardDataset": """
dataset = vlal.ShardDataset("runs/vaw/merged", split="val", image_size=64)
samples: DataLoader[dict[str, Any]] = DataLoader(dataset, batch_size=4, num_workers=2)
sizes: tuple[int, int] = (len(dataset.objects), len(dataset))
image: Tensor = dataset[0]["image"]
""",
    "ShardStream": """
stream = vlal.ShardStream("runs/vaw/merged", batch_size=64, rank=0, world_size=1)
batches: DataLoader[dict[str, Any]] = DataLoader(stream, batch_size=None, num_workers=2)
stream.load_state_dict(stream.state_dict())
""",
    "__version__": """
version: str = vlal.__version__
""",
    "clip_likelihood": """
likelihood = vlal.clip_likelihood(torch.rand(4, 8), torch.rand(3, 8), temperature=0.01)
assert_type(likelihood, Tensor)
""",
    "evaluate": """
result = vlal.evaluate(torch.rand(4, 3), labels, names=("a", "b", "c"))
assert_type(result.mAP, float | None)
""",
    "load_model": """
model = vlal.load_model("runs/vaw/export")
found = model("photo.jpg", "dog", box=(0, 0, 8, 8), top_k=5)
best: tuple[str, float, bool | None] = (found[0].name, found[0].probability, found[0].present)
""",
    "losses": """
module: torch.nn.Module = vlal.losses.SelectiveLoss(0)
""",
}
"""Public name -> its use by somebody who checks types strictly."""
MISUSES = {
    "FeasibleSets": "vlal.FeasibleSets.from_labels(object_id)",
    "SelectiveLoss": "vlal.SelectiveLoss(draw='likeliest')",
    "ShardDataset": "vlal.ShardDataset('runs/vaw/merged', batch_size=64)",
    "ShardStream": "vlal.ShardStream('runs/vaw/merged', shuffle=True)",
    "__version__": "version: int = vlal.__version__",
    "clip_likelihood": "vlal.clip_likelihood(torch.rand(4, 8))",
    "evaluate": "vlal.evaluate(torch.rand(4, 3), labels).map",
    "load_model": "vlal.load_model(3)",
    "losses": "vlal.losses.SelectiveLos()",
}
"""Public name -> a use that mypy must refuse."""
PREAMBLE = """
from typing import Any, Literal, assert_type

import numpy as np
import numpy.typing as npt
import torch
import vlal_dist as vlal
from torch import Tensor
from torch.utils.data import DataLoader

object_id: npt.NDArray[np.int64] = np.zeros(4, dtype=np.int64)
labels: npt.NDArray[np.int8] = np.ones((4, 3), dtype=np.int8)
"""


@pytest.mark.slow
def test_a_consumer_passes_strict_mypy(core: Path, tmp_path: Path) -> None:
    assert set(vlal_dist.__all__) <= set(CONSUMERS) == set(MISUSES)
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PREAMBLE + "".join(CONSUMERS[name] for name in vlal_dist.__all__))
    wrong.write_text(PREAMBLE + "\n".join(MISUSES[name] for name in vlal_dist.__all__) + "\n")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", core / "python")
    run(*mypy, right, cwd=tmp_path)
    refused = run(*mypy, wrong, cwd=tmp_path, code=1).stdout
    first = PREAMBLE.count("\n") + 1
    expected = set(range(first, first + len(vlal_dist.__all__)))
    assert {int(line) for line in re.findall(r"wrong\.py:(\d+): error", refused)} == expected
