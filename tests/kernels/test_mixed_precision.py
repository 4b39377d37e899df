"""A training step of 16-bit logits: autocast around a layer and the loss; torch's GradScaler."""

import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.loss_batches import Case, draw_of, loss_config, make
from vlal_dist.kernels.backend import choose
from vlal_dist.kernels.operator import selective_loss

ROWS, FEATURES, SIZE = 33, 16, 131
NUM_IGNORE = 20


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def forced(request, monkeypatch):
    monkeypatch.setenv("VLAL_KERNEL", request.param)
    choose.cache_clear()
    yield request.param
    choose.cache_clear()


def case_and_inputs() -> tuple[Case, Tensor]:
    """A micro-batch of four; rows' weights do the averaging, so the scale comes undivided."""
    case = make(rows=ROWS, attributes=SIZE, annotated=0.2, seed=51)
    case = case._replace(row_weight=torch.full((ROWS,), 1 / (4 * ROWS)))
    return case, torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(1))


def layer() -> nn.Linear:
    model = nn.Linear(FEATURES, SIZE)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model


def per_row(case: Case, logits: Tensor) -> Tensor:
    terms = selective_loss(
        logits,
        label=case.label,
        object_id=case.object_id,
        feasible=case.feasible,
        ignored=draw_of(case),
        loss=loss_config(num_ignore=NUM_IGNORE),
        row_weight=case.row_weight,
    )
    return terms.per_row


def exact_gradients(case: Case, inputs: Tensor) -> list[Tensor]:
    """In float64 throughout."""
    model = layer().double()
    per_row(case, model(inputs.double())).sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_near(model: nn.Module, wanted: list[Tensor], dtype: torch.dtype, scale: float = 1.0):
    """To a few roundings of that type."""
    for parameter, right in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        difference = (parameter.grad.double() / scale - right).norm()
        assert difference <= 4 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    case, inputs = case_and_inputs()
    model = layer()
    with torch.autocast("cpu", dtype):
        logits = model(inputs)
        logits.retain_grad()
        losses = per_row(case, logits)
        losses.sum().backward()
    assert logits.dtype == dtype and losses.dtype == torch.float32
    assert_near(model, exact_gradients(case, inputs), dtype)
    # Autocast changes nothing within: the same bits without it, from the same logits.
    leaf = logits.detach().requires_grad_()
    alone = per_row(case, leaf)
    alone.sum().backward()
    assert torch.equal(alone, losses) and leaf.grad is not None
    assert torch.equal(leaf.grad, logits.grad) and leaf.grad.dtype == dtype
    # And as close as float32 to what these logits give in float64.
    wide = per_row(case, logits.detach().double())
    torch.testing.assert_close(losses.double(), wide, rtol=1e-5, atol=0)


def scaled_step(model, scaler, optimizer, case, inputs) -> Tensor:
    """As torch's manual has it; the loss."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = per_row(case, model(inputs)).sum()
    scaler.scale(loss).backward()
    return loss


def test_grad_scaler():
    """It starts at 65536, which float16 does not hold; the loss's own gradients it does."""
    case, inputs = case_and_inputs()
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    small = inputs / 8  # else the layer's own sums over rows, times 65536, are beyond float16
    wanted = exact_gradients(case, small)
    loss = scaled_step(model, scaler, optimizer, case, small)
    assert loss.dtype == torch.float32
    assert_near(model, wanted, torch.float16, scale=65536.0)
    scaler.unscale_(optimizer)
    assert_near(model, wanted, torch.float16)
    before = model.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0 and not torch.equal(model.weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_grad_scaler_skips_what_is_not_finite(value):
    """One attribute's bias, so that nothing but the operator's gradient can tell of it."""
    case, inputs = case_and_inputs()
    model = layer()
    with torch.no_grad():
        model.bias[5] = value
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaled_step(model, scaler, optimizer, case, inputs / 8)
    slope = model.weight.grad
    assert slope is not None
    assert slope.isfinite().all(1).tolist() == [attribute != 5 for attribute in range(SIZE)]
    before = model.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before) and scaler.get_scale() == 32768.0
