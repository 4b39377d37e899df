"""The same bits, run after run: through autograd, in dirty memory, under torch's own strictness.

Threads and instruction sets are in test_draw.py; here is the whole way of a training step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.fixtures.loss_batches import (
    draw_of,
    drawn,
    labels,
    loss_config,
    make,
    plain,
)
from vlal_dist.kernels.arguments import MODES
from vlal_dist.kernels.backend import choose
from vlal_dist.kernels.operator import selective_loss

RUNS = {"cpu": 100, "reference": 10}
"""The readable one is made of torch's own operations, slow on a busy machine."""
ROWS = {"ignore": "asl_ignoring", "negatify": "asl_negatifying"}
FORMS = {"draw": draw_of, "list": drawn, "mask": lambda case: case.ignored}


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def forced(request, monkeypatch):
    monkeypatch.setenv("VLAL_KERNEL", request.param)
    choose.cache_clear()
    yield request.param
    choose.cache_clear()


@contextmanager
def strict() -> Iterator[None]:
    """torch refuses what is not deterministic, and fills what it allocates with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def leave_dirt(outputs, value):
    """Free memory of the outputs' sizes that holds a value: the next allocations get it."""
    dirt = [torch.full_like(output, value) for output in outputs for _ in range(2)]
    del dirt


def step(case, mode, sparse):
    """Losses, sums, counts and gradient of one training step."""
    leaf = case.logits.clone().requires_grad_()
    terms = selective_loss(
        leaf,
        label=labels(case) if sparse else case.label,
        object_id=case.object_id,
        feasible=case.feasible,
        ignored=FORMS[mode](case) if mode in FORMS else None,
        loss=loss_config(ROWS.get(mode, "selective"), margin=0.05),
        row_weight=case.row_weight,
    )
    (terms.per_row.double() * torch.linspace(0.5, 2, len(leaf))).sum().backward()
    assert leaf.grad is not None
    return terms.per_row.detach(), terms.sums, terms.counts, leaf.grad


def bits(outputs):
    return [plain(output).numpy().tobytes() for output in outputs]


@pytest.mark.parametrize("is_strict", [False, True], ids=["dirty", "strict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_runs_give_the_same_bits(mode, dtype, is_strict, forced):
    case = make(rows=33, attributes=137, annotated=0.2, seed=31).to(dtype)
    # Every third row has no weight: nothing of it may come from what the memory held before.
    case = case._replace(row_weight=(torch.arange(33) % 3).float())
    first = step(case, mode, sparse=False)
    assert all(output.isfinite().all() for output in first)
    wanted = bits(first)
    for number in range(RUNS[forced]):
        leave_dirt(first, (3, -1, 77)[number % 3])
        if is_strict:
            with strict():
                found = step(case, mode, sparse=number % 2 == 1)
        else:
            found = step(case, mode, sparse=number % 2 == 1)
        assert bits(found) == wanted, f"run {number}"


def test_the_process_generator_is_neither_read_nor_moved():
    case = make(rows=9)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = bits(step(case, "draw", sparse=False))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert bits(step(case, "draw", sparse=False)) == first
