"""The draw before there are logits: the same attributes, and the same loss from their list."""

import pytest
import torch

from tests.fixtures.loss_batches import (
    draw_of,
    instruction_sets,
    labels,
    make,
    oracle_mask,
    tensors,
)
from tests.kernels import emulated_cuda
from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cpu, reference
from vlal_dist.kernels.selective_loss import draw_ignored, selective_loss

WAYS = {
    **{name: (lambda *a, _v=name: cpu.draw(*a, variant=_v)) for name in instruction_sets()},
    "reference": reference.draw,
    "cuda-emulated": emulated_cuda.draw,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("over_unannotated", [False, True])
def test_the_list_is_the_oracles_draw(way, over_unannotated):
    for attributes in (1, 5, 131, 600):
        case = make(rows=40, attributes=attributes, annotated=0.2)
        given = tensors(case, "draw")
        del given["logits"], given["row_weight"]
        for num_ignore in (0, 1, 7, 1000):
            found = way(given, attributes, num_ignore, over_unannotated)
            assert found.dtype == torch.int32
            assert found.shape == (40, min(num_ignore, attributes))
            mask = oracle_mask(case, num_ignore=num_ignore, over_unannotated=over_unannotated)
            for row, wanted in zip(found.tolist(), mask, strict=True):
                ids = wanted.nonzero()[:, 0].tolist()
                assert row == ids + [-1] * (len(row) - len(ids))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("over_unannotated", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_the_loss_of_the_list_is_the_loss_of_the_draw(kernel, over_unannotated, sparse):
    case = make(rows=20, attributes=131, annotated=0.2)
    draw = draw_of(case, over_unannotated=over_unannotated)
    given = {
        "label": labels(case) if sparse else case.label,
        "object_id": case.object_id,
        "feasible": case.feasible,
        "kernel": kernel,
    }
    early = draw_ignored(draw, attributes=131, **given)
    gammas = (1.0, 2.0, 4.0, 7.0)
    found = selective_loss(case.logits, ignored=early, gammas=gammas, **given)
    wanted = selective_loss(case.logits, ignored=draw, gammas=gammas, **given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found.counts[4] > 0


def test_what_is_refused():
    case = make()
    given = {"label": case.label, "object_id": case.object_id, "feasible": case.feasible}
    with pytest.raises(ConfigError, match="num_ignore is -1"):
        draw_ignored(draw_of(case, num_ignore=-1), attributes=131, **given)
    with pytest.raises(ValueError, match=r"label: .*\[B, A\] with B = 9, A = 130"):
        draw_ignored(draw_of(case), attributes=130, **given)
