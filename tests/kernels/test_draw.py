"""The draw of the compiled backends: the oracle's, bit for bit; and the same bits every time."""

import hashlib
import math
from functools import partial

import pytest
import torch

from tests.fixtures.loss_batches import (
    EQUAL,
    GAMMAS,
    ON_CPU,
    PAPER,
    SEEDS,
    Backend,
    Case,
    feasible_mask,
    indptr,
    loss_config,
    make,
    on_backends,
    on_fused,
    oracle_mask,
    plain,
    run,
    same_bits,
    tensors,
)
from tests.fixtures.wide_matrix import some_of
from vlal_dist.kernels import cpu
from vlal_dist.kernels.arguments import MODES, FeasibleTable


def drawn_by(backend, case, *, num_ignore=7, over_unannotated=False):
    """The drawn attributes as bool [B, A], and that they are listed once, in ascending order."""
    rows, attributes = case.label.shape
    out = torch.full((rows, min(num_ignore, attributes)), -1, dtype=torch.int32)
    settings = {"num_ignore": num_ignore, "over_unannotated": over_unannotated}
    run(backend, case, extra={"drawn_out": out}, **settings)
    mask = torch.zeros(rows, attributes, dtype=torch.bool)
    for row, ids in enumerate(out.tolist()):
        real = [a for a in ids if a >= 0]
        assert ids == sorted(set(real)) + [-1] * (len(ids) - len(real))
        mask[row, real] = True
    return mask


def weighted(weights, *, seed=5):
    """One row in which all attributes are feasible, with these inverse weights."""
    size = len(weights)
    return make(rows=1, attributes=size, objects=1, draw_seed=seed)._replace(
        object_id=torch.tensor([0]),
        feasible=FeasibleTable(indptr([size]), torch.arange(size, dtype=torch.int32)),
        weight_indptr=indptr([size]),
        inverse_weight=torch.tensor(weights, dtype=torch.float32),
        label=torch.zeros(1, size, dtype=torch.int8),
    )


@on_fused
@pytest.mark.parametrize("over_unannotated", [False, True])
@pytest.mark.parametrize("draw_seed", some_of(SEEDS, 1, 3))
def test_the_oracles_draw(backend, draw_seed, over_unannotated):
    for attributes in (1, 2, 3, 4, 5, 15, 16, 17, 33, 63, 64, 65, 131, 600):
        case = make(rows=40, attributes=attributes, annotated=0.2, draw_seed=draw_seed)
        for num_ignore in (0, 1, 7, 30, attributes + 5):
            given = {"num_ignore": num_ignore, "over_unannotated": over_unannotated}
            assert torch.equal(drawn_by(backend, case, **given), oracle_mask(case, **given))


@on_fused
@pytest.mark.parametrize("density", [0.001, 0.01, 0.12, 0.13, 0.5, 1.1])
def test_the_oracles_draw_of_long_rows(backend, density):
    """Few and many feasible attributes: words are made by attribute or by block of four."""
    case = make(rows=6, attributes=4099, objects=8, density=density, annotated=0.01)
    for num_ignore in (1, 30, 1000):
        given = {"num_ignore": num_ignore}
        assert torch.equal(drawn_by(backend, case, **given), oracle_mask(case, **given))


@on_fused
def test_the_oracles_draw_of_many_rows(backend):
    case = make(rows=3000, attributes=120, objects=40, density=0.5, seed=11)
    assert torch.equal(drawn_by(backend, case), oracle_mask(case))


@on_fused
def test_names_and_visits_of_all_sizes(backend):
    uids = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63), -(2**32)]
    visits = [0, 1, 2**31, 2**32 - 1, 2**32, -1, 2**63 - 1, -(2**63)]
    case = make(rows=64, attributes=80, objects=3)._replace(
        uid=torch.tensor(uids).repeat(8), visit=torch.tensor(visits).repeat_interleave(8)
    )
    assert torch.equal(drawn_by(backend, case), oracle_mask(case))


@on_fused
def test_every_part_of_the_key_matters(backend):
    case = weighted([1.0] * 400)
    one = torch.tensor([1])
    case = case._replace(uid=one, visit=one, seed=one)
    first = drawn_by(backend, case, num_ignore=30)
    for name in ("uid", "visit", "seed"):
        for other in (one + 1, one * -1, *([] if name == "visit" else [one + 2**32])):
            changed = drawn_by(backend, case._replace(**{name: other}), num_ignore=30)
            assert not torch.equal(first, changed)
    same = case._replace(visit=one + 2**32)  # the low 32 bits count
    assert torch.equal(first, drawn_by(backend, same, num_ignore=30))


@on_fused
@pytest.mark.parametrize("size", some_of([1, 4, 15, 16, 17, 64, 65], 0, 2, 6))
def test_equal_keys_go_to_the_lower_id(backend, size):
    """Products beyond float32 are all infinite: equal keys, which still can be drawn."""
    case = weighted([3.4e38] * size)
    keys = drawn_by(backend, case, num_ignore=size)
    assert keys.all()
    for num_ignore in range(1, size):
        found = drawn_by(backend, case, num_ignore=num_ignore)
        assert torch.equal(found, oracle_mask(case, num_ignore=num_ignore))
    # Clocks above 1 (one in e) are infinite; those are taken last, the lowest first.
    tied = weighted([3.4e38, 1e38] * 40)
    for num_ignore in range(81):
        found = drawn_by(backend, tied, num_ignore=num_ignore)
        assert torch.equal(found, oracle_mask(tied, num_ignore=num_ignore))


@on_fused
def test_what_cannot_be_drawn(backend):
    case = weighted([1.0, math.inf, 3.0, math.inf, 1.0, 3.4e38])
    wanted = [True, False, True, False, True, True]
    for num_ignore in (4, 8, 1000, 2**31, 2**40, 2**70):
        assert drawn_by(backend, case, num_ignore=num_ignore)[0].tolist() == wanted
    assert not drawn_by(backend, weighted([math.inf] * 9), num_ignore=3).any()


@on_backends
@pytest.mark.parametrize("over_unannotated", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_dense_weights_draw_as_ragged_ones_do(backend, density, over_unannotated):
    case = make(rows=21, attributes=803, density=density, annotated=0.05, seed=12)
    feasible = feasible_mask(case)
    dense = torch.full(feasible.shape, 1e-3)  # would be drawn first, and is no inverse weight
    dense[feasible] = case.inverse_weight
    given = {**tensors(case, "draw"), "weight_indptr": None, "inverse_weight": dense}
    moved = {n: None if t is None else t.to(backend.device) for n, t in given.items()}
    settings = {"num_ignore": 7, "over_unannotated": over_unannotated}
    found = backend.run(moved, "draw", loss_config(**settings))
    assert same_bits(tuple(t.cpu() for t in found), run(backend, case, **settings))


def permuted(case: Case) -> tuple[torch.Tensor, Case]:
    order = torch.randperm(len(case.logits), generator=torch.Generator().manual_seed(2))
    return order, case.rows(order)


@on_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_nothing_but_itself(backend, dtype):
    case = make(rows=37, attributes=90, seed=8).to(dtype)
    case = case._replace(row_weight=torch.linspace(0, 2, 37))
    losses, gradient, *_ = run(backend, case)
    order, other = permuted(case)
    found = run(backend, other)
    assert torch.equal(found[0], losses[order]) and torch.equal(found[1], gradient[order])
    parts = [run(backend, case.rows(slice(a, b))) for a, b in ((0, 1), (1, 17), (17, 17), (17, 37))]
    assert torch.equal(torch.cat([part[0] for part in parts]), losses)
    assert torch.equal(torch.cat([part[1] for part in parts]), gradient)
    assert torch.equal(sum(part[3] for part in parts), run(backend, case)[3])


@pytest.mark.parametrize("group", EQUAL, ids=["fma", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets_give_the_same_bits(dtype, group):
    case = make(rows=12, attributes=203, spread=9.0, annotated=0.2, seed=9).to(dtype)
    for gammas in (PAPER, GAMMAS[3]):
        for margin in (0.0, 0.05):
            for detach_focal in (False, True):
                given = {"gammas": gammas, "margin": margin, "detach_focal": detach_focal}
                outputs = [run(backend, case, **given) for backend in group]
                assert all(same_bits(one, outputs[0]) for one in outputs)


@on_fused
@pytest.mark.parametrize("mode", MODES)
def test_threads_and_repeats_give_the_same_bits(backend, mode):
    case = make(rows=701, attributes=191, objects=30, seed=10)  # eight threads' worth
    assert case.logits.numel() >= 8 * cpu.WORTH_A_THREAD
    case = case._replace(row_weight=torch.linspace(0, 2, 701))
    first = run(backend, case, mode)
    for threads in (1, 2, 8) if backend in ON_CPU else ():
        threaded = backend._replace(run=partial(backend.run, threads=threads))
        assert same_bits(run(threaded, case, mode), first)
    for _ in range(20 if mode == "draw" else 2):
        assert same_bits(run(backend, case, mode), first)


@on_fused
def test_every_output_is_written(backend):
    """Freed memory full of NaN comes back from the allocator; nothing of it may show."""
    case = make(rows=20, attributes=77)
    case = case._replace(row_weight=(torch.arange(20) % 3).float())
    first = run(backend, case)
    for _ in range(5):
        soiled = [torch.full_like(output, -1).mul_(float("1e30")) for output in first[:3]]
        del soiled
        assert same_bits(run(backend, case), first)


GOLDEN_DRAWN = [
    [0, 5, 9, 15, 35, 39],
    [8, 11, 16, 23, 25, 32],
    [1, 16, 20, 29, 34, 36],
    [1, 14, 22, 27, 36, 37],
]
GOLDEN_GRADIENT = {"fma": "5f7f8f733a306596", "plain": "086b8b835ba491fc"}


def golden_case() -> Case:
    """Made of integers alone, so that no generator can change it."""
    rows, attributes = 4, 40
    number = torch.arange(rows * attributes)
    mixed = number * 2654435761 % 4096
    feasible = torch.tensor([a for a in range(attributes) if a % 7 != 3], dtype=torch.int32)
    label = torch.where(mixed % 9 == 0, 1, torch.where(mixed % 11 == 0, -1, 0))
    picked = mixed.view(rows, attributes)[:, feasible.long()].reshape(-1)
    return Case(
        logits=((mixed - 2048).float() / 256).view(rows, attributes),
        label=label.to(torch.int8).view(rows, attributes),
        object_id=torch.zeros(rows, dtype=torch.int64),
        feasible=FeasibleTable(indptr([len(feasible)]), feasible),
        weight_indptr=indptr([len(feasible)] * rows),
        inverse_weight=(picked + 1).float(),
        uid=torch.tensor([0, 1, -1, 2**32]),
        visit=torch.tensor([0, 1, 2, 2**31]),
        seed=torch.tensor([-7]),
        ignored=torch.zeros(rows, attributes, dtype=torch.bool),
    )


def golden_outputs(backend: Backend) -> tuple[list[list[int]], str]:
    out = torch.full((4, 6), -1, dtype=torch.int32)
    _, gradient, *_ = run(
        backend, golden_case(), extra={"drawn_out": out}, num_ignore=6, margin=0.05
    )
    return out.tolist(), hashlib.sha256(plain(gradient).numpy().tobytes()).hexdigest()[:16]


@on_fused
def test_golden(backend):
    """Runs that were stored stay repeatable: change this only when that is meant to end."""
    out, digest = golden_outputs(backend)
    assert out == GOLDEN_DRAWN
    if backend in ON_CPU:  # the exponentials of other backends are their libraries'
        assert digest == GOLDEN_GRADIENT["fma" if backend in EQUAL[0] else "plain"]
    by_oracle = oracle_mask(golden_case(), num_ignore=6)
    assert [row.nonzero()[:, 0].tolist() for row in by_oracle] == GOLDEN_DRAWN
