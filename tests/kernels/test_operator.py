"""The operator as torch sees it: autograd, compile, its registration, and what it refuses."""

import itertools
import subprocess
import sys

import pytest
import torch

from tests.fixtures.loss_batches import (
    draw_of,
    drawn,
    labels,
    loss_config,
    make,
    oracle,
    tensors,
)
from tests.fixtures.wide_matrix import some_of
from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels.arguments import MODES, TYPES
from vlal_dist.kernels.backend import choose
from vlal_dist.kernels.operator import _numbers, compiled_loss, selective_loss

ROWS = {"ignore": "asl_ignoring", "negatify": "asl_negatifying"}


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def forced(request, monkeypatch):
    """Every test here holds for the compiled backend and for the readable one."""
    monkeypatch.setenv("VLAL_KERNEL", request.param)
    choose.cache_clear()
    yield request.param
    choose.cache_clear()


def call(case, logits, form="draw", *, sparse=False, loss=None, in_place=False, **settings):
    forms = {"draw": draw_of, "list": drawn, "mask": lambda one: one.ignored}
    if loss is None:
        loss = loss_config(ROWS.get(form, "selective"), **settings)
    return selective_loss(
        logits,
        label=labels(case) if sparse else case.label,
        object_id=case.object_id,
        feasible=case.feasible,
        ignored=forms[form](case) if form in forms else None,
        row_weight=case.row_weight,
        loss=loss,
        in_place=in_place,
    )


def slope_of(case, scale, **given):
    leaf = case.logits.clone().requires_grad_()
    losses = call(case, leaf, **given).per_row
    losses.backward(scale.to(losses.dtype))
    return leaf.grad


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("form", MODES)
def test_gives_what_the_oracle_gives(form, sparse):
    case = make(annotated=0.2)._replace(row_weight=torch.linspace(0, 3, 9))
    found = call(case, case.logits.clone().requires_grad_(), form, sparse=sparse)
    gammas = loss_config(ROWS.get(form, "selective")).gammas
    losses, gradient, sums, counts = oracle(case, form, gammas=gammas)
    torch.testing.assert_close(found.per_row.detach().double(), losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.sums, sums, rtol=1e-5, atol=0)
    assert torch.equal(found.counts, counts)
    assert found.per_row.requires_grad and not found.sums.requires_grad
    scale = torch.tensor([0.0, 1.0, -2.0, 0.5, 1e-3, 64.0, 1.0, 1e4, 7.0])
    slope = slope_of(case, scale, form=form, sparse=sparse)
    wanted = gradient * scale[:, None]
    assert (slope.double() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("detach_focal", [False])
def test_gradcheck(margin, detach_focal):
    case = make(rows=3, attributes=19, objects=3, spread=2.0, annotated=0.3).to(torch.float64)
    near = (case.logits.sigmoid() - margin).abs() < 1e-3
    logits = torch.where(near, 1.0, case.logits).requires_grad_()
    case = case._replace(row_weight=torch.tensor([1.0, 0.0, 2.5]))
    assert torch.autograd.gradcheck(lambda z: call(case, z, margin=margin).per_row, logits)


def test_a_plain_sum_and_a_scaled_one():
    case = make()
    leaf = case.logits.clone().requires_grad_()
    call(case, leaf).per_row.sum().backward()
    ones = slope_of(case, torch.ones(9))
    assert torch.equal(leaf.grad, ones)
    again = case.logits.clone().requires_grad_()
    (call(case, again).per_row.sum() * 0.25).backward()
    assert torch.equal(again.grad, ones * 0.25)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**20, 2.0**-10])
def test_loss_scales_of_float16_training(scale):
    """65536, with which loss scaling starts, is beyond float16; the scaled gradients are not."""
    case = make(spread=1.0)
    half = case.to(torch.float16)
    half = half._replace(row_weight=torch.full((9,), 1e-3))
    exact = oracle(half)[1] * scale
    slope = slope_of(half, torch.full((9,), scale))
    assert slope.dtype == torch.float16
    fits = exact.abs() < 6e4
    assert fits.float().mean() > 0.9
    difference = (slope.double() - exact).abs()[fits]
    assert (difference <= 2e-3 * exact.abs()[fits] + 2.0**-24 * max(scale, 2)).all()


def test_retained_graph_gives_the_same_again():
    case = make()
    leaf = case.logits.clone().requires_grad_()
    total = call(case, leaf).per_row.sum()
    total.backward(retain_graph=True)
    first = leaf.grad.clone()
    total.backward(retain_graph=True)
    assert torch.equal(leaf.grad, first * 2)
    leaf.grad.zero_()
    total.backward(retain_graph=True)
    assert torch.equal(leaf.grad, first)


def test_a_returned_gradient_is_the_callers_own():
    """Clipping it in place must not silently reach what a retained graph keeps."""
    case = make()
    leaf = case.logits.clone().requires_grad_()
    total = call(case, leaf).per_row.sum()
    (one,) = torch.autograd.grad(total, leaf, retain_graph=True)
    first = one.clone()
    one.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaf)
    total = call(case, leaf).per_row.sum()
    assert torch.equal(torch.autograd.grad(total, leaf)[0], first)


def test_an_empty_batch_goes_backward():
    case = make(rows=0)
    leaf = case.logits.clone().requires_grad_()
    call(case, leaf).per_row.sum().backward()
    assert leaf.grad.shape == (0, 131)


def test_it_cannot_be_differentiated_twice():
    case = make()
    for function in (lambda z: call(case, z).per_row, lambda z: registered(case, z)[0]):
        leaf = case.logits.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="twice"):
            (slope,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
            slope.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(mode):
    case = make()
    expected = call(case, case.logits)
    with mode():
        found = call(case, case.logits.clone().requires_grad_())
        assert not found.per_row.requires_grad
    assert torch.equal(found.per_row, expected.per_row.detach())
    assert torch.equal(found.counts, expected.counts)


def test_layouts_of_the_logits():
    case = make()
    expected, slope = call(case, case.logits).per_row, slope_of(case, torch.ones(9))
    wide = torch.full((9, 200), torch.nan)
    wide[:, 20:151] = case.logits
    for logits in (case.logits.t().contiguous().t(), wide[:, 20:151], wide.t()[20:151].t()):
        leaf = logits.detach().requires_grad_()
        found = call(case, leaf).per_row
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.sum(), leaf)[0], slope)


def registered(case, logits, mode="draw", **settings):
    return compiled_loss(*flat(case, logits, mode, **settings))


def flat(case, logits, mode, **settings):
    """Arguments of the registered operator."""
    given = tensors(case, mode)
    listed = [given.get(name) for name in TYPES]
    return logits, listed, *_numbers(loss_config(**settings), 0), mode, "auto"


OPCHECKS = itertools.product(
    ("draw", "list"), ("contiguous", "sliced", "transposed"), (torch.float32, torch.bfloat16)
)


@pytest.mark.parametrize(("mode", "layout", "dtype"), some_of(OPCHECKS, 2, 7))
def test_opcheck(mode, layout, dtype):
    case = make(rows=4, attributes=33, annotated=0.2).to(dtype)
    logits = {
        "contiguous": case.logits,
        "sliced": torch.cat([case.logits, case.logits], dim=1)[:, 5:38],
        "transposed": case.logits.t().contiguous().t(),
    }[layout]
    leaf = logits.detach().requires_grad_()
    torch.library.opcheck(compiled_loss, flat(case, leaf, mode, margin=0.05))


@pytest.mark.parametrize("form", ["draw", "ignore"])
def test_compiled_is_eager(form):
    torch._dynamo.reset()

    loss = loss_config(ROWS.get(form, "selective"))

    def step(logits, case):
        return call(case, logits * 2, form, loss=loss).per_row.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (9, 5, 17):
        case = make(rows=rows)
        found, wanted = (case.logits.clone().requires_grad_() for _ in range(2))
        losses = compiled(found, case), step(wanted, case)
        assert torch.equal(*losses)
        for one in losses:
            one.backward()
        assert torch.equal(found.grad, wanted.grad)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["draw", "mask", "ignore"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor itself
def test_inductor(form):
    """With a sum inside, whose gradient has no memory of its own; forward, backward, any size."""
    torch._dynamo.reset()
    loss = loss_config(ROWS.get(form, "selective"), margin=0.05)

    def step(logits, case):
        return call(case, logits * 2, form, loss=loss).per_row.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (9, 5, 17):
        case = make(rows=rows)._replace(row_weight=torch.linspace(0, 2, rows))
        found, wanted = (case.logits.clone().requires_grad_() for _ in range(2))
        losses = compiled(found, case), step(wanted, case)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        for one in losses:
            one.backward()
        assert torch.equal(found.grad, wanted.grad)
    torch._dynamo.reset()


WRONG = {
    "logits": [torch.zeros(9), torch.zeros(9, 131, dtype=torch.int32)],
    "label": [torch.zeros(9, 130, dtype=torch.int8), torch.zeros(9, 131)],
    "object_id": [torch.zeros(8, dtype=torch.int64), torch.zeros(9, dtype=torch.int32)],
    "uid": [torch.zeros(9, 1, dtype=torch.int64), torch.zeros(9, dtype=torch.int32)],
    "visit": [torch.zeros(10, dtype=torch.int64), torch.zeros(9)],
    "seed": [torch.zeros(2, dtype=torch.int64), torch.tensor(3)],
    "weight_indptr": [torch.zeros(9, dtype=torch.int64), torch.zeros(10, dtype=torch.int32)],
    "inverse_weight": [torch.zeros(9, dtype=torch.float64)],
    "row_weight": [torch.ones(8), torch.ones(9, dtype=torch.float64), torch.ones(9, 1)],
}


@pytest.mark.parametrize("name", WRONG)
def test_misfits_are_named(name):
    for wrong in WRONG[name]:
        case = make()._replace(**{name: wrong})
        with pytest.raises(ValueError, match=f"^{name}: "):
            call(case, case.logits)


def test_misfits_of_lists_masks_and_sparse_labels_are_named():
    case = make()
    with pytest.raises(ValueError, match=r"^ignored: "):
        call(case._replace(ignored=case.ignored[:, 1:]), case.logits, "mask")
    for wrong in (drawn(case)[1:], drawn(case).long(), drawn(case)[0]):
        with pytest.raises(ValueError, match=r"^drawn: "):
            selective_loss(
                case.logits,
                label=case.label,
                object_id=case.object_id,
                feasible=case.feasible,
                ignored=wrong,
                loss=loss_config(),
            )
    for field in ("indptr", "code"):
        sparse = labels(case)
        sparse = sparse._replace(**{field: getattr(sparse, field).double()})
        with pytest.raises(ValueError, match=f"^label_{field}: "):
            selective_loss(
                case.logits,
                label=sparse,
                object_id=case.object_id,
                feasible=case.feasible,
                ignored=None,
                loss=loss_config("ce_ignoring"),
            )


@pytest.mark.parametrize("loss", [{}, {"draw": "top"}, {"loss": "psl"}])
def test_a_loss_that_ignores_some_pairs_needs_to_be_given_them(loss):
    case = make()
    with pytest.raises(ConfigError, match="give a Draw or a mask"):
        selective_loss(
            case.logits,
            label=case.label,
            object_id=case.object_id,
            feasible=case.feasible,
            ignored=None,
            loss=LossConfig(**loss),
        )


def test_no_attributes(forced):
    """In a process of its own: an empty tensor has no address."""
    if forced == "reference":
        pytest.skip("only the compiled one is given addresses")
    code = (
        "from tests.kernels.test_operator import *; case = make(rows=3, attributes=0);"
        "assert call(case, case.logits, 'ignore').per_row.tolist() == [0, 0, 0]"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_in_place_gives_the_same_in_the_logits_memory(scale, dtype):
    case = make(annotated=0.3).to(dtype)
    weight = torch.eye(131, dtype=dtype).requires_grad_()
    expected = call(case, case.logits @ weight)
    (wanted,) = torch.autograd.grad(expected.per_row.sum() * scale, weight)
    logits = case.logits @ weight
    found = call(case, logits, in_place=True)
    assert torch.equal(found.per_row, expected.per_row)
    slope = slope_of(case, torch.ones(9))
    assert torch.equal(logits.detach(), slope), "the gradient is where the logits were"
    (gradient,) = torch.autograd.grad(found.per_row.sum() * scale, weight)
    assert torch.equal(gradient, wanted)


def test_in_place_of_strided_logits():
    case = make(annotated=0.3)
    expected, slope = call(case, case.logits).per_row, slope_of(case, torch.ones(9))
    wide = torch.full((9, 200), 7.0)
    wide[:, 20:151] = case.logits
    columns = case.logits.t().contiguous().t()  # no stride of 1 along the rows: copied there, back
    for logits in (wide[:, 20:151], columns):
        assert torch.equal(call(case, logits, in_place=True).per_row, expected)
        assert torch.equal(logits, slope)
    assert (wide[:, :20] == 7).all() and (wide[:, 151:] == 7).all()


def test_in_place_is_refused_where_the_logits_are_needed():
    case = make()
    with pytest.raises(ValueError, match="leaf"):
        call(case, case.logits.clone().requires_grad_(), in_place=True)
    strip = torch.zeros(9 * 5 + 131)
    for shared in (case.logits[:1].expand(9, -1), strip.as_strided((9, 131), (5, 1))):
        with pytest.raises(ValueError, match="share memory"):
            call(case, shared, in_place=True)
    logits = torch.sigmoid(case.logits.clone().requires_grad_())  # its backward needs its result
    loss = call(case, logits, in_place=True).per_row.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_scales_once():
    case = make()
    weight = torch.eye(131).requires_grad_()
    loss = call(case, case.logits @ weight, in_place=True).per_row.sum() * 0.5
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_does_nothing_under_compile():
    torch._dynamo.reset()
    case = make()
    logits = case.logits.clone()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = compiled(case, logits, loss=loss_config("selective"), in_place=True)
    assert torch.equal(found.per_row, call(case, case.logits).per_row)
    assert torch.equal(logits, case.logits)
    torch._dynamo.reset()
