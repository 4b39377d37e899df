"""Building the library, and what happens where that cannot be done."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fixtures.loss_batches import make, oracle
from tests.kernels.test_operator import call
from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cpu
from vlal_dist.kernels.backend import Chosen, choose

CACHES = (choose, cpu.load)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, quick compilation; nothing remembered, before or after."""
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-O0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VLAL_KERNEL", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


def script(path: Path, body: str) -> str:
    """A compiler of our own."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_the_reference_works(no_compiler, caplog):
    chosen = choose("cpu")
    assert chosen == Chosen("reference", "no C++ compiler: install g++, or set CXX")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    case = make()
    leaf = case.logits.clone().requires_grad_()
    found = call(case, leaf)
    found.per_row.sum().backward()
    losses, gradient, _, counts = oracle(case)
    torch.testing.assert_close(found.per_row.detach().double(), losses, rtol=1e-5, atol=0)
    assert (leaf.grad.double() - gradient).norm() <= 1e-6 * gradient.norm()
    assert torch.equal(found.counts, counts)
    assert len(caplog.records) == 1, "said once"


def test_with_and_without_a_compiler_the_draw_is_the_same(monkeypatch):
    case = make(rows=50)
    compiled = call(case, case.logits)
    assert choose("cpu").name == "cpu"
    choose.cache_clear()
    monkeypatch.setenv("VLAL_KERNEL", "reference")
    readable = call(case, case.logits)
    assert torch.equal(compiled.counts, readable.counts)
    torch.testing.assert_close(compiled.per_row, readable.per_row, rtol=1e-5, atol=0)


def test_the_fused_one_is_taken_where_it_works():
    assert choose("cpu") == Chosen("cpu", f"compiled for {cpu.instruction_set()}")


def test_the_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv("VLAL_KERNEL", "reference")
    for device in ("cpu", "cuda"):
        assert choose(device) == Chosen("reference", "set by VLAL_KERNEL")
    assert not cpu.cache_folder().exists()


def test_unknown_names_are_refused(monkeypatch):
    monkeypatch.setenv("VLAL_KERNEL", "fast")
    with pytest.raises(ConfigError, match="VLAL_KERNEL is 'fast'; give one of cpu, "):
        choose("cpu")


def test_what_is_forced_must_work(monkeypatch, no_compiler):
    monkeypatch.setenv("VLAL_KERNEL", "cpu")
    with pytest.raises(ConfigError, match="VLAL_KERNEL=cpu: no C\\+\\+ compiler"):
        choose("cpu")
    with pytest.raises(ConfigError, match="does not work on cuda"):
        choose("cuda")


def test_a_compiler_that_fails_is_reported_in_one_line(monkeypatch, tmp_path):
    body = (
        'if [ "$1" = --version ]; then echo "cc 1"; exit; fi\n'
        'for last; do :; done; echo half > "$last"\n'
        'echo "In file included" >&2; echo "cpu.cpp:1: error: no such thing" >&2; exit 1'
    )
    monkeypatch.setenv("CXX", script(tmp_path / "cc", body))
    with pytest.raises(ConfigError) as caught:
        cpu.build("baseline")
    assert str(caught.value) == f"{tmp_path}/cc failed: cpu.cpp:1: error: no such thing"
    assert [path.name for path in cpu.cache_folder().iterdir()] == ["lock"]
    assert choose("cpu").name == "reference" and "no such thing" in choose("cpu").why


def test_a_compiler_that_is_no_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"CXX=.*nowhere is not a program"):
        cpu.build("baseline")
    (tmp_path / "cc").write_text("no script")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cc"))
    with pytest.raises(ConfigError, match="cc cannot be started: Exec format error"):
        cpu.build("baseline")


def test_a_compiler_may_have_a_wrapper_and_arguments(monkeypatch, tmp_path):
    wrapper = script(tmp_path / "cache compiler", 'echo "$@" > "$0.log"; exec "$@"')
    monkeypatch.setenv("CXX", f"'{wrapper}' g++ -g0")
    assert cpu.build("baseline").exists()
    assert (tmp_path / "cache compiler.log").read_text().startswith("g++ -g0 -D")


def test_what_was_built_before_needs_no_compiler(monkeypatch, tmp_path):
    made = cpu.build("baseline")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu.build("baseline") == made


def test_a_library_that_does_not_load_is_not_used(monkeypatch, tmp_path):
    body = (
        'if [ "$1" = --version ]; then echo "cc 2"; exit; fi\n'
        'for last; do :; done; echo "not a library" > "$last"'
    )
    monkeypatch.setenv("CXX", script(tmp_path / "cc", body))
    assert choose("cpu").name == "reference"


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written .*set XDG_CACHE_HOME"):
        cpu.build("baseline")
    assert choose("cpu").name == "reference"


def test_the_library_is_named_after_all_that_goes_into_it(monkeypatch, tmp_path):
    body = 'if [ "$1" = --version ]; then echo "cc 3"; exit; fi\nfor last; do :; done; : > "$last"'
    monkeypatch.setenv("CXX", script(tmp_path / "cc", body))
    names = {cpu.build("baseline").name}
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DOTHER"))
    names.add(cpu.build("baseline").name)
    sources = tmp_path / "src"
    sources.mkdir()
    for source in cpu.SOURCES.iterdir():
        (sources / source.name).write_bytes(source.read_bytes())
    with (sources / "draw.h").open("a") as header:
        header.write("// changed\n")
    monkeypatch.setattr(cpu, "SOURCES", sources)
    names.add(cpu.build("baseline").name)
    assert len(names) == 3


def test_processes_that_build_at_once_compile_once(tmp_path):
    log = tmp_path / "log"
    body = f'case "$*" in *cpu.cpp*) echo one >> {log}; sleep 1;; esac; exec g++ "$@" -O0'
    environment = {**os.environ, "CXX": script(tmp_path / "cc", body)}
    code = (
        "from vlal_dist.kernels import cpu; from vlal_dist.kernels.cpu import build;"
        "cpu.load('baseline'); print(build('baseline'))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    left = sorted(path.name for path in cpu.cache_folder().iterdir())
    assert left == [Path(outputs[0].decode().strip()).name, "lock"]
    assert log.read_text() == "one\n"


def test_the_cache_is_its_users_alone():
    made = cpu.build("baseline")
    folder = cpu.cache_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(made.stat().st_mode) == 0o644
    folder.chmod(0o777)  # as older versions left it, under a wide umask
    assert cpu.build("baseline") == made and stat.S_IMODE(folder.stat().st_mode) == 0o700


def planted(path):
    """A library whose constructor tells that it was loaded."""
    source = path.with_suffix(".c")
    code = "extern int setenv(const char*, const char*, int);__attribute__((constructor))"
    source.write_text(f'{code} static void f(void) {{ setenv("PLANTED", "1", 1); }}')
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", source, "-o", path], check=True)


LOADS = """
import ctypes, os, sys
from vlal_dist.kernels import cpu
cpu.load("baseline")
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
sys.exit(3 if libc.getenv(b"PLANTED") else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["writable", "link", "foreign", "none", "foreign folder"],
)
def test_a_planted_library_is_not_loaded(how, tmp_path, monkeypatch):
    """Of another user, open to others, or a link: compiled again; only one's own is loaded."""
    monkeypatch.undo()
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment["CXX"] = script(tmp_path / "cc", 'exec g++ "$@" -O0')
    find = "from vlal_dist.kernels import cpu; print(cpu.build('baseline'))"
    first = [sys.executable, "-c", find]
    done = subprocess.run(first, env=environment, capture_output=True, text=True, check=True)
    target = Path(done.stdout.strip())
    target.unlink()
    planted(target)
    if how == "writable":
        target.chmod(0o666)
    elif how == "link":
        target.rename(tmp_path / "elsewhere.so")
        target.symlink_to(tmp_path / "elsewhere.so")
    elif how.startswith("foreign"):
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(target if how == "foreign" else target.parent, 12345, 12345)
    done = subprocess.run(
        [sys.executable, "-c", LOADS], env=environment, capture_output=True, text=True, check=False
    )
    if how == "none":  # the plant works: what is one's own is loaded, here without the function
        assert "undefined symbol" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    named = target.parent if how == "foreign folder" else target
    assert f"{named} " in done.stderr and "no code is loaded from it" in done.stderr
    again = subprocess.run(first, env=environment, capture_output=True, text=True, check=True)
    assert (again.stdout == f"{target}\n") == (how != "foreign folder")


def test_a_lock_that_is_a_link_harms_nothing(tmp_path):
    victim = tmp_path / "precious"
    victim.write_text("precious")
    folder = cpu.cache_folder()
    folder.mkdir(mode=0o700, parents=True)
    (folder / "lock").symlink_to(victim)
    with pytest.raises(ConfigError, match=r"cannot be written .*/lock.*set XDG_CACHE_HOME"):
        cpu.build("baseline")
    assert victim.read_text() == "precious"
    (folder / "lock").unlink()
    (folder / "lock").write_text("not ours to empty")
    assert cpu.build("baseline").exists()
    assert (folder / "lock").read_text() == "not ours to empty"
