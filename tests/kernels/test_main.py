"""`python -m vlal_dist.kernels`: what it says, and what it leaves in the cache."""

import sys

import pytest
import torch

from tests.kernels.test_cpu_build import script
from vlal_dist.kernels import __main__ as program
from vlal_dist.kernels import cpu, cuda, self_test
from vlal_dist.kernels.backend import choose
from vlal_dist.kernels.cpu import VARIANTS


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("VLAL_KERNEL", raising=False)
    choose.cache_clear()
    yield
    choose.cache_clear()


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vlal_dist.kernels", *arguments])
    return program.main()


def test_the_report(monkeypatch, capsys):
    assert run(monkeypatch) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    told = {line[0]: line[1:] for line in lines}
    assert told["cpu"] == ["cpu", choose("cpu").why]
    assert {"cuda", "compiler", "nvrtc", "cache"} <= set(told)
    assert ["self-test", "cpu"] in [line[:2] for line in lines]


def test_what_is_forced_is_told(monkeypatch, capsys):
    monkeypatch.setenv("VLAL_KERNEL", "reference")
    assert run(monkeypatch) == 0
    assert "cpu             reference   VLAL_KERNEL says so" in capsys.readouterr().out
    monkeypatch.setenv("VLAL_KERNEL", "fpga")
    choose.cache_clear()
    assert run(monkeypatch) == 64
    assert "none of cpu, cuda, reference" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_forced_and_not_there(monkeypatch, capsys):
    monkeypatch.setenv("VLAL_KERNEL", "cuda")
    assert run(monkeypatch) == 64
    assert capsys.readouterr().err == "error: VLAL_KERNEL=cuda: torch sees no GPU\n"


@pytest.mark.parametrize("wrong", ["draw", "loss", "gradient"])
def test_a_wrong_backend_is_found(wrong, monkeypatch, capsys):
    """Each output of the C++ operator spoiled in turn."""
    run_right, draw_right = cpu.run, cpu.draw

    def spoiled(tensors, **settings):
        losses, gradient, sums, counts = run_right(tensors, **settings)
        if wrong == "loss":
            losses[7] *= 1.0001
        if wrong == "gradient":
            gradient[3] *= 1.001
        return losses, gradient, sums, counts

    monkeypatch.setattr(cpu, "run", spoiled)
    if wrong == "draw":
        monkeypatch.setattr(cpu, "draw", lambda *a: draw_right(*a).flip(0))
    assert choose("cpu").name == "cpu"
    assert run(monkeypatch) == 1
    told = capsys.readouterr()
    assert "self-test cpu   WRONG" in told.out and "VLAL_KERNEL=reference" in told.err
    assert ("ANOTHER DRAW" in told.out) == (wrong == "draw")


def test_the_self_test_passes():
    assert self_test.self_test(torch.device("cpu")).good


def test_build_fills_the_cache(monkeypatch, capsys, tmp_path):
    """Every variant; a GPU's programs of one treatment stand for all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    quick = 'if [ "$1" = --version ]; then echo "cc 4"; exit; fi\nfor last; do :; done; : > "$last"'
    monkeypatch.setenv("CXX", script(tmp_path / "cc", quick))  # test_build.py has the real one
    monkeypatch.setattr(program, "_common", lambda: [cuda.Settings(0, "draw", *REST)])
    assert run(monkeypatch, "build", "--architecture", "sm_90") == 0
    files = sorted(path.name for path in (tmp_path / "vlal-dist").iterdir())
    told = sorted(line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines())
    assert told == [name for name in files if name != "lock"]
    assert [name.split("-")[0] for name in told] == ["cpu"] * len(VARIANTS) + ["cuda"] * 2


REST = ((1.0, 2.0, 4.0, 7.0), 0.05, True, cuda.WARP)


def test_an_unknown_architecture_is_told(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "build", "--architecture", "sm_1") == 64
    assert "sm_1" in capsys.readouterr().err
