"""Small draws of any shape and weight, and losses of any finite logit, against the oracle."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.loss_batches import FUSED, Case, feasible_mask, indptr, oracle, oracle_mask, run
from vlal_dist.kernels.arguments import FeasibleTable

WEIGHTS = [1.0, 2.0, 1e30, 3e38, 3.4e38, float("inf")]
SIZES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 63, 64, 65)
int64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def cases(draw):
    rows, objects = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    attributes = draw(st.sampled_from(SIZES))
    ids = st.lists(st.integers(0, attributes - 1), unique=True)
    sets = [sorted(draw(ids | st.just(range(attributes)))) for _ in range(objects)]
    object_id = draw(st.lists(st.integers(0, objects - 1), min_size=rows, max_size=rows))
    lengths = [len(sets[o]) for o in object_id]
    weight = st.sampled_from(WEIGHTS) | st.floats(1, 2.0**127, width=32)
    few = draw(st.lists(weight, min_size=1, max_size=6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    pool = torch.tensor(few, dtype=torch.float32)
    annotated = draw(st.sampled_from([0.0, 0.2, 1.1]))
    sign = torch.randint(0, 2, (rows, attributes), generator=g) * 2 - 1
    is_annotated = torch.rand(rows, attributes, generator=g) < annotated
    names = [draw(st.lists(int64, min_size=rows, max_size=rows)) for _ in range(2)]
    return Case(
        logits=torch.randn(rows, attributes, generator=g) * draw(st.sampled_from([1, 10, 25])),
        label=torch.where(is_annotated, sign, 0).to(torch.int8),
        object_id=torch.tensor(object_id, dtype=torch.int64),
        feasible=FeasibleTable(
            indptr([len(one) for one in sets]),
            torch.tensor([a for one in sets for a in one], dtype=torch.int32),
        ),
        weight_indptr=indptr(lengths),
        inverse_weight=pool[torch.randint(0, len(few), (sum(lengths),), generator=g)],
        uid=torch.tensor(names[0], dtype=torch.int64),
        visit=torch.tensor(names[1], dtype=torch.int64),
        seed=torch.tensor([draw(int64)]),
        ignored=torch.rand(rows, attributes, generator=g) < 0.3,
    )


@given(cases(), st.sampled_from(["all", 0, 1, 2, 7, 64, 1000]), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=80)
def test_any_draw(case, num_ignore, over_unannotated, sparse):
    given_ = {"num_ignore": num_ignore, "over_unannotated": over_unannotated}
    mask = oracle_mask(case, **given_)
    exact = oracle(case, **given_)
    rows, attributes = case.label.shape
    for backend in FUSED:
        out = torch.full((rows, attributes), -1, dtype=torch.int32)
        extra = {"drawn_out": out} if num_ignore != "all" else {}
        losses, gradient, _, counts = run(backend, case, sparse=sparse, extra=extra, **given_)
        ids = [row[row >= 0].tolist() for row in out]
        if extra:
            assert ids == [row.nonzero()[:, 0].tolist() for row in mask]
        assert ((gradient != 0) & mask & (case.label == 0)).sum() == 0
        assert torch.equal(counts, exact[3])
        torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(gradient.double(), exact[1], rtol=1e-5, atol=1e-30)
        assert torch.equal(counts[2:].sum(), (case.label == 0).sum())


@given(cases())
@settings(deadline=None, max_examples=30)
def test_all_is_the_whole_drawing_set(case):
    """Members that cannot be drawn included."""
    unannotated = case.label == 0
    wanted = (feasible_mask(case) & unannotated).sum()
    for backend in FUSED:
        *_, counts = run(backend, case, num_ignore="all")
        assert counts[4] == wanted and counts[2] == 0
