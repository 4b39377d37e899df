"""`python -m vlal_dist.kernels`: its report, exit codes, and the files in the cache."""

import sys

import pytest
import torch

from tests.kernels.test_cpu_build import script
from vlal_dist.config.sections import LossConfig
from vlal_dist.kernels import __main__ as program
from vlal_dist.kernels import cpu, cuda
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
    report = {line[0]: line[1:] for line in lines}
    assert report["cpu"] == ["cpu", choose("cpu").why]
    assert {"cuda", "compiler", "nvrtc", "cache"} <= set(report)
    assert ["self-test", "cpu"] in [line[:2] for line in lines]


def test_a_forced_backend_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("VLAL_KERNEL", "reference")
    assert run(monkeypatch) == 0
    assert "cpu             reference   set by VLAL_KERNEL" in capsys.readouterr().out
    monkeypatch.setenv("VLAL_KERNEL", "fpga")
    choose.cache_clear()
    assert run(monkeypatch) == 64
    assert "give one of cpu, cuda, reference" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_forced_and_not_there(monkeypatch, capsys):
    monkeypatch.setenv("VLAL_KERNEL", "cuda")
    assert run(monkeypatch) == 64
    assert capsys.readouterr().err == "error: VLAL_KERNEL=cuda: torch sees no GPU\n"


@pytest.mark.parametrize("wrong", ["draw", "loss", "gradient"])
def test_a_wrong_backend_is_found(wrong, monkeypatch, capsys):
    """Each output of the C++ operator spoiled in turn."""
    run_right = cpu.run

    def spoiled(*given):
        losses, gradient, sums, counts = run_right(*given)
        if wrong == "draw":
            gradient[5] = gradient[5].flip(0)
        if wrong == "loss":
            losses[7] *= 1.0001
        if wrong == "gradient":
            gradient[3] *= 1.001
        return losses, gradient, sums, counts

    monkeypatch.setattr(cpu, "run", spoiled)
    assert choose("cpu").name == "cpu"
    assert run(monkeypatch) == 1
    printed = capsys.readouterr()
    assert "self-test cpu   WRONG" in printed.out and "VLAL_KERNEL=reference" in printed.err
    assert ("ANOTHER DRAW" in printed.out) == (wrong == "draw")


def test_the_self_test_passes():
    assert program.self_test(torch.device("cpu"))[0]


def test_build_fills_the_cache(monkeypatch, capsys, tmp_path):
    """Every variant; a GPU's programs of one treatment stand for all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    quick = 'if [ "$1" = --version ]; then echo "cc 4"; exit; fi\nfor last; do :; done; : > "$last"'
    monkeypatch.setenv("CXX", script(tmp_path / "cc", quick))  # test_build.py has the real one
    monkeypatch.setattr(
        program, "_common", lambda: [cuda.program(0, "draw", LossConfig(), cuda.WARP)]
    )
    assert run(monkeypatch, "build", "--architecture", "sm_90") == 0
    files = sorted(path.name for path in (tmp_path / "vlal-dist").iterdir())
    printed = sorted(line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines())
    assert printed == [name for name in files if name != "lock"]
    assert [name.split("-")[0] for name in printed] == ["cpu"] * len(VARIANTS) + ["cuda"] * 2


def test_an_unknown_architecture_is_refused(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "build", "--architecture", "sm_1") == 64
    assert "sm_1" in capsys.readouterr().err
