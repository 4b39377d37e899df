"""What must not change a row: padding, the form of the labels, more elements than 2^31."""

import pytest
import torch

from tests.fixtures.loss_batches import (
    BACKENDS,
    FUSED,
    indptr,
    loss_config,
    make,
    plain,
    run,
    same_bits,
)
from vlal_dist.kernels.arguments import MODES, FeasibleTable

on_backends = pytest.mark.parametrize("backend", BACKENDS, ids=[b.name for b in BACKENDS])
on_fused = pytest.mark.parametrize("backend", FUSED, ids=[b.name for b in FUSED])


def drawn_of(backend, case, k=7):
    out = torch.full((len(case.logits), k), -1, dtype=torch.int32)
    return out, run(backend, case, extra={"drawn_out": out}, num_ignore=k)


@on_backends
@pytest.mark.parametrize("over_unannotated", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_sparse_labels_give_the_bits_of_dense_ones(backend, mode, over_unannotated):
    for annotated in (0.0, 0.03, 0.5, 1.1):
        case = make(rows=20, attributes=133, annotated=annotated, seed=61)
        given = {"over_unannotated": over_unannotated, "margin": 0.05, "num_ignore": 30}
        dense, sparse = (run(backend, case, mode, sparse=s, **given) for s in (False, True))
        assert same_bits(dense, sparse)


@on_backends
@pytest.mark.parametrize("mode", MODES)
def test_padding_rows_of_no_weight_change_nothing(backend, mode):
    """The last batch of an epoch: rows that fill it up, whatever they hold."""
    full = make(rows=24, attributes=90, annotated=0.2, seed=62)
    full.logits[17:] = torch.nan
    full = full._replace(row_weight=(torch.arange(24) < 17).float())
    short = full.rows(slice(0, 17))
    losses, gradient, sums, counts = run(backend, full, mode)
    wanted = run(backend, short, mode)
    assert torch.equal(losses[:17], wanted[0]) and torch.equal(gradient[:17], wanted[1])
    assert (losses[17:] == 0).all() and (gradient[17:] == 0).all()
    # The reference adds in another order when there are more rows.
    torch.testing.assert_close(sums, wanted[2], rtol=1e-6, atol=0)
    assert torch.equal(counts, wanted[3])


@on_fused
@pytest.mark.parametrize("attributes", [132, 136, 160, 1024, 4099])
def test_more_attributes_in_the_vocabulary_draw_the_same(backend, attributes):
    """A word belongs to its attribute, not to a place in the batch."""
    case = make(rows=16, attributes=131, annotated=0.2, seed=63)
    more = attributes - 131
    wide = case._replace(
        logits=torch.cat([case.logits, torch.full((16, more), -60.0)], dim=1),
        label=torch.cat([case.label, torch.zeros(16, more, dtype=torch.int8)], dim=1),
    )
    narrow_ids, narrow = drawn_of(backend, case)
    wide_ids, found = drawn_of(backend, wide)
    assert torch.equal(wide_ids, narrow_ids) and (narrow_ids >= 0).any()
    torch.testing.assert_close(found[1][:, :131], narrow[1], rtol=1e-6, atol=1e-30)
    assert torch.equal(found[3][[0, 1, 2, 4]], narrow[3][[0, 1, 2, 4]])


@on_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_the_memory_of_strided_logits_is_the_same(backend, dtype):
    case = make(annotated=0.3).to(dtype)
    case = case._replace(row_weight=torch.linspace(0, 3, 9))
    wide = torch.full((9, 200), 7.0, dtype=dtype, device=backend.device)
    logits = wide[:, 20:151].copy_(case.logits)
    wanted = run(backend, case)
    assert same_bits(run(backend, case, extra={"logits": logits, "gradient": logits}), wanted)
    assert torch.equal(logits.cpu(), wanted[1])
    assert (wide[:, :20] == 7).all() and (wide[:, 151:] == 7).all()


@pytest.mark.nightly
@pytest.mark.skipif(not FUSED, reason="no C++ compiler")
def test_more_elements_than_32_bits_count():
    """12 GiB of memory, half a minute: 2^31 elements and some, rows across that border."""
    attributes, k, size = 50_021, 30, 180
    rows = 2**31 // attributes + 40
    assert rows * attributes > 2**31
    g = torch.Generator().manual_seed(64)
    ids = torch.randperm(attributes, generator=g)[:size].sort().values.to(torch.int32)
    block = torch.randn(64, attributes, generator=g).mul_(5).to(torch.bfloat16)
    logits = block.repeat(-(-rows // 64), 1)[:rows]
    inverse = torch.exp(torch.rand(size, generator=g) * 8)
    feasible = FeasibleTable(indptr([size]), ids)

    def outputs(first: int, last: int):
        number = last - first
        out = torch.full((number, k), -1, dtype=torch.int32)
        given = {
            "logits": logits[first:last],
            "object_id": torch.zeros(number, dtype=torch.int64),
            "feasible_indptr": feasible.indptr,
            "feasible_index": feasible.indices,
            "label_indptr": torch.arange(number + 1),
            "label_code": (torch.arange(first, last) % attributes * 2 + 1).to(torch.int32),
            "weight_indptr": torch.arange(number + 1) * size,
            "inverse_weight": inverse.repeat(number),
            "uid": torch.arange(first, last),
            "visit": torch.full((number,), 3),
            "seed": torch.tensor([-1]),
            "drawn_out": out,
        }
        made = FUSED[0].run(given, "draw", loss_config(num_ignore=k))
        return *made, out

    losses, gradient, _, counts, drawn = outputs(0, rows)
    assert int(counts.sum()) == rows * attributes and int(counts[0]) == rows
    border = 2**31 // attributes
    for first, last in ((0, 3), (border // 2 - 1, border // 2 + 2), (border - 2, rows)):
        part = outputs(first, last)
        assert torch.equal(losses[first:last], part[0])
        assert torch.equal(drawn[first:last], part[4])
        same = plain(gradient[first:last]) == plain(part[1])
        assert same.all()
