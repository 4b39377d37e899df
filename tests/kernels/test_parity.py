"""Losses, gradients, sums and counts against float64 of the readable functions in `method/`."""

import pytest
import torch

from tests.fixtures.loss_batches import (
    BACKENDS,
    GAMMAS,
    PAPER,
    away_from,
    make,
    on_backends,
    on_fused,
    oracle,
    run,
    same_bits,
)
from vlal_dist.kernels.arguments import MODES

WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.37, 1e-3, 1.0, 0.0, 8.0, 1.0])


def assert_close(found, exact, *, rtol=1e-5, norm=1e-6, absolute=2e-6):
    losses, gradient, sums, counts = found
    torch.testing.assert_close(losses.double(), exact[0], rtol=rtol, atol=1e-30)
    torch.testing.assert_close(sums, exact[2], rtol=rtol, atol=1e-30)
    assert sums.dtype == torch.float64
    assert torch.equal(counts, exact[3])
    difference = gradient.double() - exact[1]
    assert difference.norm() <= norm * exact[1].norm()
    assert difference.abs().max() <= absolute * max(1.0, exact[1].abs().max().item())


def ordinal(values):
    """16-bit floats as integers in the order of their values."""
    bits = values.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@on_backends
@pytest.mark.parametrize("detach_focal", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("gammas", GAMMAS)
def test_float32(backend, gammas, margin, detach_focal):
    case = away_from(make(rows=12, attributes=150, seed=1), margin)
    settings = {"gammas": gammas, "margin": margin, "detach_focal": detach_focal}
    found = run(backend, case, **settings)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_close(found, oracle(case, **settings))


@on_backends
@pytest.mark.parametrize("detach_focal", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("gammas", GAMMAS)
def test_large_logits(backend, gammas, margin, detach_focal):
    """To |z| = 80, where clamped formulas give 0; element by element outside of underflow."""
    size = torch.linspace(17, 80, 64)
    case = make(rows=4, attributes=128, annotated=0.5)
    case = case._replace(logits=torch.cat([size, -size])[torch.randperm(128)].repeat(4, 1))
    settings = {"gammas": gammas, "margin": margin, "detach_focal": detach_focal}
    found, exact = run(backend, case, **settings), oracle(case, **settings)
    assert_close(found, exact)
    floor = 1e-6 if margin else 1e-35
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-4, atol=floor)


@on_backends
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_modes_and_forms_of_the_labels(backend, mode, weighted, sparse):
    case = away_from(make(annotated=0.3, seed=2), 0.05)
    if weighted:
        case = case._replace(row_weight=WEIGHTS)
    found = run(backend, case, mode, sparse=sparse, margin=0.05)
    assert_close(found, oracle(case, mode, margin=0.05))


@on_backends
@pytest.mark.parametrize("over_unannotated", [False, True])
@pytest.mark.parametrize("num_ignore", ["all", 0, 1, 30, 10_000])
def test_draws(backend, num_ignore, over_unannotated):
    case = make(annotated=0.3, seed=3)
    settings = {"num_ignore": num_ignore, "over_unannotated": over_unannotated}
    assert_close(run(backend, case, **settings), oracle(case, **settings))


@on_fused
@pytest.mark.parametrize("detach_focal", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("gammas", [PAPER, GAMMAS[3]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(backend, dtype, gammas, margin, detach_focal):
    """The gradient is that of float64 of the same logits, to one step of the 16-bit type."""
    case = away_from(make(rows=12, attributes=150, seed=4), margin).to(dtype)
    settings = {"gammas": gammas, "margin": margin, "detach_focal": detach_focal}
    losses, gradient, _, counts = run(backend, case, **settings)
    exact = oracle(case, **settings)
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=0)
    assert torch.equal(counts, exact[3])
    steps = (ordinal(gradient) - ordinal(exact[1].to(dtype))).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 0.01
    upcast = run(backend, case.to(torch.float32), **settings)
    assert torch.equal(gradient, upcast[1].to(dtype)) and torch.equal(losses, upcast[0])


@on_fused
def test_every_half_precision_number_is_read_and_written(backend):
    """All 65,536 patterns go in as the right number; infinities and NaN come back as such."""
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(64, 1024)
        case = make(rows=64, attributes=1024)._replace(logits=logits)
        wide = run(backend, case.to(torch.float32), "negatify")
        found = run(backend, case, "negatify")
        assert torch.equal(found[1].isnan(), wide[1].isnan())
        torch.testing.assert_close(found[1], wide[1].to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("detach_focal", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("gammas", GAMMAS)
def test_float64(gammas, margin, detach_focal):
    case = away_from(make(seed=5).to(torch.float64), margin, 1e-4)
    case = case._replace(row_weight=WEIGHTS)
    settings = {"gammas": gammas, "margin": margin, "detach_focal": detach_focal}
    found, exact = run(BACKENDS[-1], case, **settings), oracle(case, **settings)
    assert found[0].dtype == found[1].dtype == torch.float64
    torch.testing.assert_close(found[0], exact[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[2], exact[2], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[1], exact[1], rtol=1e-10, atol=1e-12)


@on_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_apart(backend, dtype):
    """Columns of a wider tensor, and every other row: the same bits as from a copy."""
    case = make(rows=9, attributes=131).to(dtype)
    wide = torch.full((18, 150), torch.nan, dtype=dtype)
    wide[::2, 7:138] = case.logits
    view = wide[::2, 7:138]
    assert view.stride() == (300, 1)
    assert same_bits(run(backend, case._replace(logits=view)), run(backend, case))
    one = case.rows(slice(3, 4))
    assert same_bits(run(backend, one._replace(logits=view[3:4])), run(backend, one))
    repeated = one.logits.expand(9, -1)
    expanded = run(backend, case._replace(logits=repeated))
    assert same_bits(expanded, run(backend, case._replace(logits=repeated.contiguous())))


@on_fused
@pytest.mark.parametrize("attributes", [1, 7, 15, 16, 17, 63, 64, 65, 591, 16_319, 16_321, 33_000])
def test_any_number_of_attributes(backend, attributes):
    case = make(rows=3, attributes=attributes, objects=3, annotated=0.2, density=0.5, seed=6)
    assert_close(run(backend, case), oracle(case), norm=1e-5)  # one pair may be all there is
    assert_close(run(backend, case, "mask"), oracle(case, "mask"), norm=1e-5)


@on_backends
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "attributes"), [(0, 5), (1, 1), (0, 0)])
def test_nothing_to_do(backend, mode, rows, attributes):
    case = make(rows=rows, attributes=attributes)
    losses, gradient, sums, counts = run(backend, case, mode)
    assert losses.shape == (rows,) and gradient.shape == (rows, attributes)
    assert counts.sum() == rows * attributes
    assert sums.isfinite().all() and sums[4] == 0


@on_backends
def test_all_annotated(backend):
    case = make(annotated=1.1, seed=7)
    assert (case.label != 0).all()
    found = run(backend, case, num_ignore=30)
    assert_close(found, oracle(case, num_ignore=30))
    assert found[3][2:].tolist() == [0, 0, 0]
    assert same_bits(found, run(backend, case, num_ignore=30, over_unannotated=True))
