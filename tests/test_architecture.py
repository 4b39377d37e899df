"""The constitution: who may import whom, who owns which library, sizes, and a README that is true.

Imports are read from the source, lazy and type-checking ones included.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vlal_dist", "shard_tools", "demo")
PROGRAMS = (
    "train",
    "score_clip",
    "evaluate",
    "predict",
    "report",
    "export",
    "experiments",
    "supervise",
)

TORCH_FREE_DATA = {
    f"vlal_dist.data.{name}"
    for name in (
        "dataset",
        "rows",
        "shards",
        "index",
        "images",
        "scores",
        "keyed",
        "ledger",
        "corpus",
        "plan",
        "stream",
        "steps",
        "factors",
        "mixture",
        "photos",
    )
}
NUMPY_METHOD = {"vlal_dist.method.feasible", "vlal_dist.method.likelihood"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "vocabulary": {"errors"},
    "processes": set(),
    "config": {"errors"},
    "observability": set(),
    "storage": {"errors"},
    "method": {"errors"},
    "kernels": {"errors", "method"},
    "data": {"errors", "vocabulary", "storage", "method"},
    "evaluation": {"errors", "method", "data", "storage", "vocabulary"},
    "scoring": {"errors", "method", "data", "storage", "observability", "vocabulary"},
    "training": {
        "errors", "method", "kernels", "data", "evaluation", "storage", "observability",
        "vocabulary", "processes",
    },
    "experimenting": {"errors", "evaluation", "data", "storage", "method", "vocabulary"},
    "predicting": {"errors", "evaluation", "data", "storage"},
    "program": {"errors", "config", "storage", "observability"},
    "shard_tools": {
        "errors", "program", "config", "vocabulary", "storage", "observability", "method", "data",
    },
    "demo": {"errors", "config", "storage", "observability", "vocabulary", "method", "data"},
}  # fmt: skip

OWNERS: dict[str, str | tuple[str, ...]] = {
    "ray": (
        "vlal_dist/scoring/actors.py",
        "vlal_dist/scoring/ray_session.py",
        "vlal_dist/scoring/ray_metrics.py",
    ),
    "open_clip": "vlal_dist/scoring/clip.py",
    "deepspeed": "vlal_dist/training/engine.py",
    "boto3": "vlal_dist/storage/",
    "botocore": "vlal_dist/storage/",
    "tarfile": "vlal_dist/data/shards.py",
    "jinja2": ("vlal_dist/evaluation/page.py", "vlal_dist/evaluation/table_page.py"),
    "onnx": "vlal_dist/evaluation/onnx_export.py",
    "onnxruntime": "vlal_dist/evaluation/onnx_export.py",
    "onnxscript": "vlal_dist/evaluation/onnx_export.py",
    "prometheus_client": "vlal_dist/observability/metrics.py",
    "tensorboard": "vlal_dist/observability/event_files.py",
    "wandb": "vlal_dist/observability/wandb_run.py",
    "mlflow": "vlal_dist/observability/mlflow_run.py",
    "pydantic": "vlal_dist/config/",
}


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every product module."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path) -> set[str]:
    """Absolute names that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    """The room of a dotted module name."""
    parts = name.split(".")
    if parts[0] != "vlal_dist":
        return parts[0]
    if len(parts) == 1:
        return "vlal_dist"
    return "programs" if parts[1] in PROGRAMS else parts[1]


def violations(root: Path) -> list[str]:
    """Every import that the rules forbid."""
    known = dict(modules(root))
    bad = []
    for name, path in known.items():
        here = room(name)
        for target in imports(path) & set(known):
            there = room(target)
            if there in (here, "vlal_dist"):
                continue
            if there in ("programs", "shard_tools", "demo"):
                bad.append(f"{name} imports {target}: nothing imports a program")
            elif here == "programs":
                continue
            elif there not in ALLOWED.get(here, set()):
                bad.append(f"{name} imports {target}")
            elif (
                here == "data"
                and there == "method"
                and target not in NUMPY_METHOD | {"vlal_dist.method"}
            ):
                bad.append(f"{name} imports {target}: data reads feasible and likelihood only")
            elif here == "shard_tools" and there == "data" and target not in TORCH_FREE_DATA:
                bad.append(f"{name} imports {target}: not torch-free")
        for library in {target.split(".")[0] for target in imports(path)} & set(OWNERS):
            where = path.relative_to(root).as_posix()
            if not where.startswith(OWNERS[library]) and not where.startswith("demo/"):
                bad.append(f"{name} imports {library}, owned by {OWNERS[library]}")
    return bad


def test_imports_flow_one_way() -> None:
    assert violations(ROOT) == []


def test_the_import_test_can_fail(tmp_path: Path) -> None:
    for package in ("vlal_dist/method", "vlal_dist/storage", "shard_tools"):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
    (tmp_path / "vlal_dist/storage/store.py").write_text("import os\n")
    (tmp_path / "vlal_dist/method/loss.py").write_text(
        "def f():\n    import ray\n    from vlal_dist.storage import store\n"
    )
    (tmp_path / "vlal_dist/storage/bad.py").write_text("import vlal_dist.train\n")
    (tmp_path / "vlal_dist/train.py").write_text("")
    found = violations(tmp_path)
    assert len(found) == 3, found


def cycles(root: Path) -> list[str]:
    """Modules that reach themselves through imports."""
    known = dict(modules(root))
    graph = {name: (imports(path) & set(known)) - {name} for name, path in known.items()}
    bad = []
    for name in graph:
        seen, stack = set(), list(graph[name])
        while stack:
            one = stack.pop()
            if one not in seen:
                seen.add(one)
                stack.extend(graph[one])
        if name in seen:
            bad.append(name)
    return bad


def test_no_cycles() -> None:
    assert cycles(ROOT) == []


def test_sizes() -> None:
    bad = []
    for name, path in modules(ROOT):
        text = path.read_text(encoding="utf-8")
        limit = 150 if ".method." in name else 300
        if len(text.splitlines()) > limit:
            bad.append(f"{name}: {len(text.splitlines())} lines, at most {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    bad.append(f"{name}.{node.name}: {length} lines, at most 60")
    assert bad == []


def test_package_files_are_empty() -> None:
    for name, path in modules(ROOT):
        if path.name == "__init__.py" and name != "vlal_dist":
            assert path.read_text() == "", name


@pytest.mark.parametrize(
    "stage", ["clean", "pack", "merge", "verify", "inspect_dataset", "reshard"]
)
def test_shard_tools_are_torch_free(stage: str) -> None:
    code = f"import sys, shard_tools.{stage}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_torch_free_test_can_fail() -> None:
    code = "import sys, vlal_dist.data.batches; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 1


def test_no_prints_shells_or_pickles() -> None:
    for name, path in modules(ROOT):
        text = path.read_text(encoding="utf-8")
        assert "shell=True" not in text, name
        assert not re.search(r"\bimport pickle|pickle\.loads?\(|allow_pickle=True", text), name
        assert "weights_only=False" not in text, name


def readme_rows() -> list[tuple[str, str, str]]:
    """Rows `| paper | what | \\`file: name\\` |` of the README's table of equations."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([\w/.]+): (\w+)` \|$", text, re.MULTILINE)
    return [(paper.strip(), path, name) for paper, _, path, name in rows]


def test_every_row_of_the_equation_table_resolves() -> None:
    rows = readme_rows()
    assert len(rows) >= 10
    for paper, path, name in rows:
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        target = getattr(module, name)
        for tag in re.findall(r"Eq\. \(\d\)", paper):
            assert tag in (target.__doc__ or ""), f"{path}: {name} lacks the tag {tag}"


def test_no_machine_paths() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    ).stdout.split("\0")
    pattern = re.compile(r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|home/\w+)/")
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".sh", ".txt", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not pattern.search(text), f"{name} holds a path of one machine"
