"""The command `vlal`: its commands, what it imports, wrong commands, the other ways to start."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vlal_dist.__main__ import main
from vlal_dist.errors import EXTRAS, extras_named
from vlal_dist.program import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    "import clean pack score merge train evaluate report export predict experiments verify inspect "
    "reshard supervise demo run"
)


def vlal(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, in which `code` runs first."""
    start = f"{code}\nimport sys\nfrom vlal_dist.__main__ import main\nsys.exit(main())\n"
    return subprocess.run(
        [sys.executable, "-c", start, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


HEAVY = """
import atexit, sys
atexit.register(lambda: print("loaded:", sorted({"torch", "numpy", "ray"} & set(sys.modules))))
"""


def test_help_lists_the_commands_in_order_and_imports_nothing() -> None:
    done = vlal("--help", code=HEAVY)
    assert done.returncode == 0 and done.stdout.endswith("loaded: []\n")
    lines = done.stdout.splitlines()
    assert lines[0] == "usage: vlal COMMAND [--config FILE] [--section.key value ...]"
    words = [line.split()[0] for line in lines[2:] if line.startswith("  ") and line[2] != " "]
    assert words[: len(COMMANDS)] == ORDER.split() == list(COMMANDS)
    assert {"--config", "--json", "--help,"} <= set(words) and "--version" in done.stdout
    assert all(len(line) <= 100 for line in lines) and "74 I/O" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evalute"], "vlal: error: unknown command 'evalute'; the nearest is evaluate; "),
        (["score_clip"], "the nearest is score;"),
        ([], "usage: vlal COMMAND"),
        (["train", "--epochs", "3"], "train: error: unknown flag --epochs; known: --config"),
        (["clean", "--plan"], "clean: error: unknown flag --plan"),
    ],
)
def test_a_wrong_command_is_a_usage_error_without_torch(words: list[str], message: str) -> None:
    done = vlal(*words, code=HEAVY)
    assert done.returncode == 2
    assert message in done.stderr and "torch" not in done.stdout.rpartition("loaded:")[2]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlal {importlib.import_module('vlal_dist').__version__}\n"


SEVERAL_WORDS = ("demo", "run", "experiments", "supervise", "import")
PROGRAMS = [name for name in COMMANDS if name not in SEVERAL_WORDS]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_is_called_vlal_in_its_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: vlal {name} [")


def test_programs_of_several_words_have_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiments", "table2", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: vlal experiments table2 [")
    assert main(["import", "table", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: vlal import table [")
    assert main(["supervise", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: vlal supervise")
    assert main(["experiments", "table7"]) == 2
    assert "unknown table 'table7'; the nearest is table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "usage"),
    [
        (["-m", "vlal_dist", "pack"], "vlal pack"),
        (["-m", "vlal_dist.score_clip"], "vlal score"),
        (["-m", "shard_tools", "verify"], "vlal verify"),
        (["-m", "shard_tools"], "python -m shard_tools TOOL"),
        (["vlal_dist/train.py"], "vlal train"),
    ],
)
def test_the_other_ways_to_start_stay(start: list[str], usage: str) -> None:
    command = [sys.executable, *start, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {usage} "), done.stderr


OLD = re.compile(
    r"[Rr]un (`?python -m|score_clip|shard_tools|make setup)|python -m shard_tools [a-z]"
)


def test_messages_name_commands_of_vlal() -> None:
    bad = []
    for package in ("vlal_dist", "shard_tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if path != ROOT / "shard_tools/__main__.py" and (found := OLD.search(text)):
                bad.append(f"{path.relative_to(ROOT)}: {found[0]!r}")
    assert bad == []


HIDE = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"
"""An import of such a module raises the same error as that of one that is not installed."""


def without_extras() -> str:
    return HIDE.format(names=list(EXTRAS))


@pytest.mark.parametrize("extra", sorted(set(EXTRAS.values())))
def test_every_extra_is_one_of_the_package(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = " ".join(project["optional-dependencies"][extra])
    modules = [module for module, one in EXTRAS.items() if one == extra]
    assert any(module in needed for module in modules), f"{extra} installs {needed}"
    core = " ".join(project["dependencies"])
    assert not [module for module in modules if module in core]


def test_every_program_explains_itself_without_extras() -> None:
    names = [name for name in COMMANDS if name not in ("demo", "run")]
    for_each = f"for name in {names!r}: assert main([name, '--help']) == 0, name"
    code = f"{without_extras()}from vlal_dist.__main__ import main\n{for_each}\n"
    assert vlal("--version", code=code).returncode == 0


def test_an_absent_extra_is_one_line(small: Path, tmp_path: Path) -> None:
    config = ("--config", str(small / "config.yaml"), "--observability.metrics", "false")
    run = ("--paths.run", str(tmp_path / "run"))
    for words, line in (
        (
            ("score", *config, "--paths.scores", str(tmp_path / "scores")),
            r"score_clip: error: (ray|open_clip) is not installed; "
            r"run: pip install 'vlal-dist\[score\]'\n",
        ),
        (
            ("verify", *config, "--paths.merged", "s3://bucket/prefix"),
            r"verify: error: botocore is not installed; run: pip install 'vlal-dist\[s3\]'\n",
        ),
        (
            ("train", "--ranks", "2", *config, *run),
            r"train: error: deepspeed is not installed; run: pip install 'vlal-dist\[train\]'\n",
        ),
        (
            ("demo", "--root", str(tmp_path / "demo")),
            r"demo: error: open_clip is not installed; run: pip install 'vlal-dist\[score\]'\n",
        ),
        (
            ("train", *config, *run),
            r"train: error: deepspeed is not installed; run: pip install 'vlal-dist\[train\]'\n",
        ),
    ):
        done = vlal(*words, code=without_extras())
        assert done.returncode == 64, done.stderr
        assert re.search(f"^{line}", done.stderr, re.MULTILINE), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.deepspeed
def test_training_does_without_tensorboard(small: Path, tmp_path: Path) -> None:
    words = ("--config", str(small / "config.yaml"), "--paths.run", str(tmp_path))
    code = HIDE.format(names=["tensorboard"])
    done = vlal("train", *words, "--observability.metrics", "false", code=code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tensorboard") == 1 and "vlal-dist[train]" in done.stderr


def test_a_store_that_needs_an_extra_names_it() -> None:
    code = without_extras() + (
        "from vlal_dist.errors import ConfigError\n"
        "from vlal_dist.storage.store import open_store\n"
        "try: open_store('s3://bucket/prefix')\n"
        "except ConfigError as error: print(error)\n"
    )
    assert "pip install 'vlal-dist[s3]'" in vlal("--version", code=code).stdout


def test_other_absent_modules_are_no_extras() -> None:
    with pytest.raises(ModuleNotFoundError), extras_named():
        importlib.import_module("no_such_module")
