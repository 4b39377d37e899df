"""Architecture: imports between packages, owners of libraries, sizes, words, the README's table.

Imports are read from the source, lazy and type-checking ones included.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vlal_dist", "shard_tools")
PROGRAMS = (
    "train",
    "score_clip",
    "evaluate",
    "predict",
    "report",
    "export",
    "experiments",
    "supervise",
    "run",
    "__main__",
)

TORCH_FREE = ("vlal_dist.data.hashing", "vlal_dist.data.format", "vlal_dist.data.order")
"""What `shard_tools` may import of `vlal_dist.data`: it must start without torch."""
NUMPY_METHOD = {"vlal_dist.method.feasible", "vlal_dist.method.likelihood"}

_BASE = {"errors", "remarks", "contents", "config", "vocabulary", "storage"}
ALLOWED: dict[str, set[str]] = {
    "vlal_dist": {"losses", "datasets", "method", "release"},
    "losses": {"errors", "remarks", "config", "method", "kernels"},
    "datasets": _BASE | {"method", "data", "processes"},
    "errors": set(),
    "remarks": {"errors"},
    "contents": {"errors", "remarks"},
    "vocabulary": {"errors", "remarks", "contents"},
    "processes": {"errors", "remarks"},
    "config": {"errors", "remarks", "contents"},
    "storage": {"errors", "remarks", "contents"},
    "observability": {"errors", "remarks", "storage"},
    "method": {"errors", "remarks", "config"},
    "kernels": {"errors", "remarks", "config", "method"},
    "data.hashing": set(),
    "data.format": _BASE | {"method", "data.hashing"},
    "data.order": _BASE | {"method", "data.hashing", "data.format"},
    "data.loading": _BASE | {"method", "data.hashing", "data.format", "data.order"},
    "evaluation": _BASE | {"method", "data"},
    "release": _BASE | {"method", "data", "evaluation"},
    "reporting": _BASE | {"method", "data", "evaluation", "release"},
    "ray_tasks": {"errors", "remarks", "storage", "processes"},
    "scoring": _BASE | {"method", "data", "observability", "processes", "ray_tasks"},
    "training": _BASE
    | {"method", "kernels", "data", "evaluation", "release", "observability", "processes"},
    "experimenting": _BASE
    | {"method", "data", "evaluation", "release", "reporting", "processes", "pipeline"},
    "pipeline": {"errors", "remarks", "contents", "config", "storage"},
    "program": {"errors", "remarks", "contents", "config", "storage", "observability", "pipeline"},
    "shard_tools": _BASE
    | {"program", "pipeline", "observability", "method", "data", "processes", "ray_tasks"},
    "demo": _BASE | {"observability", "method", "data", "processes"},
}
"""What each package may import; `data` stands for all of its packages."""

OWNERS: dict[str, str | tuple[str, ...]] = {
    "ray": ("vlal_dist/ray_tasks.py", "vlal_dist/scoring/ray_cluster.py"),
    "open_clip": "vlal_dist/scoring/clip.py",
    "deepspeed": "vlal_dist/training/engine.py",
    "boto3": "vlal_dist/storage/",
    "botocore": "vlal_dist/storage/",
    "tarfile": "vlal_dist/data/format/tar.py",
    "simplejpeg": "vlal_dist/data/format/jpeg.py",
    "jinja2": "vlal_dist/reporting/page.py",
    "onnx": "vlal_dist/release/onnx_export.py",
    "onnxruntime": "vlal_dist/release/onnx_export.py",
    "onnxscript": "vlal_dist/release/onnx_export.py",
    "prometheus_client": "vlal_dist/observability/metrics.py",
    "tensorboard": "vlal_dist/observability/event_files.py",
    "wandb": "vlal_dist/observability/tracker_clients.py",
    "mlflow": "vlal_dist/observability/tracker_clients.py",
    "psutil": ("vlal_dist/processes.py", "vlal_dist/training/stop.py", "vlal_dist/supervise.py"),
    "webdataset": "shard_tools/importers/webdataset.py",
    "pydantic": ("vlal_dist/config/", "vlal_dist/contents.py"),
    "yaml": ("vlal_dist/config/load.py", "vlal_dist/contents.py"),
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


def package(name: str) -> str:
    """The package of a dotted module name, as `ALLOWED` names it."""
    parts = name.split(".")
    if parts[0] != "vlal_dist":
        return parts[0]
    if len(parts) == 1:
        return "vlal_dist"
    if parts[1] == "data" and len(parts) > 2:
        return f"data.{parts[2]}"
    return "programs" if parts[1] in PROGRAMS else parts[1]


def allowed(here: str, there: str) -> bool:
    """Whether a package may import another."""
    listed = ALLOWED.get(here, set())
    return there in listed or there.split(".")[0] in listed - {here.split(".")[0]}


def violations(root: Path) -> list[str]:
    """Every import that the rules forbid."""
    known = dict(modules(root))
    bad = []
    for name, path in known.items():
        here = package(name)
        for target in imports(path) & set(known):
            there = package(target)
            if there in (here, "vlal_dist", "data"):
                continue
            if there in ("programs", "shard_tools", "demo"):
                bad.append(f"{name} imports {target}: nothing imports a program")
            elif here == "programs":
                continue
            elif not allowed(here, there):
                bad.append(f"{name} imports {target}")
            elif here == "shard_tools" and not (
                target.startswith(TORCH_FREE) or there.split(".")[0] != "data"
            ):
                bad.append(f"{name} imports {target}: not torch-free")
            elif (
                here.startswith("data")
                and there == "method"
                and target not in NUMPY_METHOD | {"vlal_dist.method"}
            ):
                bad.append(f"{name} imports {target}: data reads feasible and likelihood only")
        for library in {target.split(".")[0] for target in imports(path)} & set(OWNERS):
            where = path.relative_to(root).as_posix()
            if not where.startswith(OWNERS[library]) and not where.startswith("vlal_dist/demo/"):
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


MODULE_LINES, FUNCTION_LINES = 600, 80


def test_sizes() -> None:
    bad = []
    for name, path in modules(ROOT):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MODULE_LINES:
            bad.append(f"{name}: {len(text.splitlines())} lines, at most {MODULE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    bad.append(f"{name}.{node.name}: {length} lines, at most {FUNCTION_LINES}")
    assert bad == []


PARAMETERS = 8
MANY_PARAMETERS = {
    "vlal_dist.losses.__init__": "a loss: the numbers of its formula",
    "vlal_dist.kernels.operator.selective_loss": "an operator: a batch's tensors, and two options",
    "vlal_dist.datasets.__init__": "a public constructor: all but the root have defaults",
}
"""Functions with more parameters, and why: `module.function` -> reason."""


def test_no_function_takes_many_parameters() -> None:
    bad = []
    for name, path in modules(ROOT):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = len([one for one in given if one.arg not in ("self", "cls")])
                if count > PARAMETERS and f"{name}.{node.name}" not in MANY_PARAMETERS:
                    bad.append(f"{name}.{node.name}: {count} parameters, at most {PARAMETERS}")
    assert bad == []


SHORT_MODULES = {
    "vlal_dist": "the public names",
    "vlal_dist.__main__": "the command `vlal`",
    "vlal_dist.data.format.photo_groups": "needed by torch-free tools and by evaluation",
    "vlal_dist.data.order.ledger": "one class, used by plan, epoch check and checkpoint",
    "vlal_dist.data.order.rank_split": "the split over ranks, a section of docs/stream.md",
    "vlal_dist.report": "a program",
    "vlal_dist.score_clip": "a program",
    "vlal_dist.training.launch": "started as a process of its own",
    "shard_tools.__main__": "the entry point of shard_tools",
}
"""Modules below `SHORT` lines, and why they stand alone; empty ones mark packages."""
SHORT = 60


def test_short_modules_have_a_reason() -> None:
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules(ROOT)}
    short = {name for name, count in lines.items() if 0 < count < SHORT}
    assert short <= set(SHORT_MODULES), "join them to the module that they belong to"


UNCLEAR = re.compile(r"\b(told|nobody|poison|anew)\b|\bdesign (section )?\d", re.IGNORECASE)


def test_no_unclear_words_or_missing_documents() -> None:
    bad = []
    sources = [path for suffix in ("py", "h", "cpp", "cu", "html") for name in PACKAGES
               for path in (ROOT / name).rglob(f"*.{suffix}")]  # fmt: skip
    for path in sources:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if found := UNCLEAR.search(line):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {found[0]!r}")
    assert bad == []


HIDE_TORCH = """
import importlib, pathlib, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def without_torch(*names: str) -> subprocess.CompletedProcess[str]:
    """Import modules in a process in which torch cannot be found."""
    command = [sys.executable, "-c", HIDE_TORCH, *names]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_the_torch_free_half_imports_where_torch_is_missing() -> None:
    names = [name for name, _ in modules(ROOT) if name.startswith((*TORCH_FREE, "shard_tools"))]
    names = [name for name in names if not name.endswith("__main__")]
    found = without_torch(*names)
    assert len(names) > 20 and found.returncode == 0, found.stderr


def test_the_torch_free_test_can_fail() -> None:
    found = without_torch("vlal_dist.data.loading.batch_builder")
    assert found.returncode == 1 and "torch is hidden" in found.stderr


def test_no_prints_shells_or_pickles() -> None:
    for name, path in modules(ROOT):
        text = path.read_text(encoding="utf-8")
        assert "shell=True" not in text, name
        assert not re.search(r"\bimport pickle|pickle\.loads?\(|allow_pickle=True", text), name
        assert "weights_only=False" not in text, name
        # A thread of Arrow's that outlives the program ends it with an abort.
        assert "parquet.read_table(" not in text and "pq.read_table(" not in text, name


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
