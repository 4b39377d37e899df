"""SelectiveLoss and the other losses: against the paper's table, the draw's law, and torch."""

import copy
import itertools
import math
import pickle
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.draw_statistics import HIGH, LOW, chi_square_p
from tests.fixtures.loss_batches import draw_of, feasible_mask, make
from vlal_dist.config.sections import LossConfig
from vlal_dist.kernels.backend import choose
from vlal_dist.kernels.operator import selective_loss
from vlal_dist.losses import (
    AsymmetricLoss,
    CrossEntropyLoss,
    PartiallySelectiveLoss,
    SelectiveLoss,
    compiled_inputs,
)
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.method.ignore_set import psl_ignored, top_ignore_set
from vlal_dist.method.likelihood import inverse_weights, log_likelihood

ROWS, ATTRIBUTES, OBJECTS = 9, 41, 4
GAMMAS = (1.0, 2.0, 4.0, 7.0)


@pytest.fixture(params=["cpu", "reference"])
def kernel(request, monkeypatch):
    """The compiled operator and the readable one."""
    monkeypatch.setenv("VLAL_KERNEL", request.param)
    choose.cache_clear()
    yield request.param
    choose.cache_clear()


def batch(seed=0, rows=ROWS, *, sets=True):
    """Arguments of `forward` by name, and the feasible sets; likelihoods fit both."""
    rng = np.random.default_rng(seed)
    member = rng.random((OBJECTS, ATTRIBUTES)) < 0.5
    member[0], member[:, 5] = False, True
    if not sets:
        member[:] = True
    pairs = np.argwhere(member)
    feasible = FeasibleSets.from_labels(pairs[:, 0], np.eye(ATTRIBUTES, dtype=int)[pairs[:, 1]])
    object_id = rng.integers(0, OBJECTS, rows)
    likelihood = rng.exponential(size=(rows, ATTRIBUTES)) * member[object_id]
    likelihood[rng.random(likelihood.shape) < 0.1] = 0
    labels = rng.integers(-1, 2, (rows, ATTRIBUTES)) * (rng.random((rows, ATTRIBUTES)) < 0.3)
    given = {
        "logits": torch.from_numpy(rng.normal(size=labels.shape) * 3),
        "labels": torch.from_numpy(labels),
        "object_id": torch.from_numpy(object_id),
        "likelihood": torch.from_numpy(likelihood),
        "sample_id": torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, rows)),
        "epoch": 3,
    }
    return given, feasible


def call(loss, given, **changed):
    """The loss and its gradient."""
    given = {**given, **changed}
    logits = given.pop("logits").detach().clone().requires_grad_()
    value = loss(logits, given.pop("labels"), **given)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def philox(counter, key):
    """Philox4x32-10 of Salmon et al., in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def fig_3(likelihood, drawable, num_ignore, *, uid, visit, seed=99):
    """Omega_Ignore of a row: the first to finish of clocks with rates g."""
    uid, seed = uid % 2**64, seed % 2**64
    finish = {}
    for a in np.flatnonzero(drawable & (likelihood > 0)).tolist():
        counter = (a >> 2, visit % 2**32, uid & 0xFFFFFFFF, uid >> 32)
        word = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[a & 3]
        finish[a] = -math.log1p(-(word + 0.5) / 2**32) / likelihood[a]
    ignored = np.zeros(len(likelihood), bool)
    ignored[sorted(finish, key=finish.__getitem__)[:num_ignore]] = True
    return ignored


def table(z, label, feasible, ignored, *, gammas, margin, detach_focal):
    """Losses and slopes of all pairs, Eqs. (1), (3), (4), in float64."""
    p = 1 / (1 + np.exp(-z))
    kind = np.where(label > 0, 0, np.where(label < 0, 1, np.where(feasible, 2, 3)))
    gamma = np.array(gammas)[kind]
    # -(1 - p)^gamma log p
    present = -((1 - p) ** gamma) * np.log(p)
    present_slope = -((1 - p) ** (gamma + 1))
    if not detach_focal:
        present_slope = present_slope + gamma * (1 - p) ** gamma * p * np.log(p)
    # -p_m^gamma log(1 - p_m)
    active = p > margin
    p_m = np.where(active, p - margin, 0.5)
    absent = -(p_m**gamma) * np.log(1 - p_m)
    absent_slope = p_m**gamma * p * (1 - p) / (1 - p_m)
    if not detach_focal:
        absent_slope = absent_slope - gamma * p_m ** (gamma - 1) * p * (1 - p) * np.log(1 - p_m)
    counts = ~(ignored & (label == 0))
    loss = np.where(label > 0, present, np.where(active, absent, 0))
    slope = np.where(label > 0, present_slope, np.where(active, absent_slope, 0))
    return loss * counts, slope * counts


@pytest.mark.parametrize("detach_focal", [True, False])
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("draw_over", ["feasible", "unannotated"])
@pytest.mark.parametrize("sets", [True, False])
@pytest.mark.parametrize("num_ignore", [0, 6, "all"])
def test_the_papers_table(kernel, num_ignore, sets, draw_over, margin, detach_focal):
    given, feasible = batch(1, sets=sets)
    loss = SelectiveLoss(
        num_ignore,
        feasible=feasible if sets else None,
        margin=margin,
        detach_focal=detach_focal,
        draw_over=draw_over,
        reduction="none",
    )
    member = feasible.mask(ATTRIBUTES)[given["object_id"].numpy()]
    label = given["labels"].numpy()
    drawable = member & (label == 0) if draw_over == "unannotated" else member
    ignored = drawable if num_ignore == "all" else np.zeros_like(drawable)
    if num_ignore == 6:
        names, g = given["sample_id"].tolist(), given["likelihood"].numpy()
        rows = zip(g, drawable, names, strict=True)
        ignored = np.stack([fig_3(*row, 6, uid=name, visit=3) for *row, name in rows])
        assert (ignored.sum(1) == 6).any()
    pairs, slopes = table(
        given["logits"].numpy(), label, member, ignored,
        gammas=GAMMAS, margin=margin, detach_focal=detach_focal,
    )  # fmt: skip
    value, gradient = call(loss, given)
    np.testing.assert_allclose(value, pairs.sum(1), rtol=1e-12)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-9, atol=1e-14)
    value, gradient = call(loss, given, logits=given["logits"].float())
    assert value.dtype == gradient.dtype == torch.float32
    np.testing.assert_allclose(value, pairs.sum(1), rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=2e-6)


def drawn(value_of, likelihood, rows, **keyed):
    """Which attributes were drawn, bool [rows, A]: those without a gradient."""
    g = torch.tensor(likelihood).expand(rows, -1)
    logits = torch.zeros(g.shape, requires_grad=True)
    value_of(logits, torch.zeros(g.shape, dtype=torch.int8), likelihood=g, **keyed).backward()
    return logits.grad == 0


WEIGHTS = [0.4, 0.05, 0.0, 0.25, 0.1, 0.2]


@pytest.mark.parametrize("keyed", [True, False])
def test_the_first_drawn_is_distributed_as_the_likelihood(keyed):
    rows = 40_000
    torch.manual_seed(5)
    key = {"sample_id": torch.full((rows,), 7), "epoch": torch.arange(rows)} if keyed else {}
    count = drawn(SelectiveLoss(1), WEIGHTS, rows, **key).sum(0).double().numpy()
    share = np.array(WEIGHTS)
    assert count[2] == 0 and count.sum() == rows
    likely = share > 0
    statistic = ((count - rows * share)[likely] ** 2 / (rows * share[likely])).sum()
    assert LOW < chi_square_p(float(statistic), likely.sum() - 1) < HIGH


def test_pairs_are_drawn_without_replacement():
    """P({i, j}) = g_i g_j / (1 - g_i) + g_j g_i / (1 - g_j)."""
    rows, g = 60_000, np.array(WEIGHTS)
    mask = drawn(SelectiveLoss(2), WEIGHTS, rows, sample_id=torch.arange(rows), epoch=0)
    statistic, kinds = 0.0, 0
    for i, j in combinations(np.flatnonzero(g).tolist(), 2):
        expected = rows * g[i] * g[j] * (1 / (1 - g[i]) + 1 / (1 - g[j]))
        statistic += (int((mask[:, i] & mask[:, j]).sum()) - expected) ** 2 / expected
        kinds += 1
    assert LOW < chi_square_p(statistic, kinds - 1) < HIGH


def test_keyed_draws_are_the_trainers(kernel):
    """The same losses bit for bit from the ragged weights that training reads."""
    rng = np.random.default_rng(3)
    case = make(rows=50, attributes=131, seed=4, annotated=0.1)
    similarity = rng.normal(size=len(case.inverse_weight)).astype(np.float32) * 0.1
    bounds = case.weight_indptr.numpy()
    inverse = inverse_weights(log_likelihood(similarity, bounds, temperature=0.01), bounds)
    case = case._replace(inverse_weight=torch.from_numpy(inverse), seed=torch.tensor([99]))
    member = feasible_mask(case)
    g = torch.zeros(member.shape, dtype=torch.float64)
    g[member] = 1 / case.inverse_weight.double()
    g /= g.sum(1, keepdim=True).clamp(min=1e-300)
    indices = case.feasible.indices.numpy()
    counts = np.ones(len(indices), np.int32)
    sets = FeasibleSets(case.feasible.indptr.numpy(), indices, counts, counts)
    wanted = selective_loss(
        case.logits,
        label=case.label,
        object_id=case.object_id,
        feasible=case.feasible,
        ignored=draw_of(case),
        loss=LossConfig(),
    )
    given = {"sample_id": case.uid, "epoch": case.visit, "object_id": case.object_id}
    found = SelectiveLoss(feasible=sets, reduction="none")(
        case.logits, case.label, likelihood=g, **given
    )
    assert torch.equal(found, wanted.per_row)


def test_torchs_seed_repeats_a_draw_without_ids():
    given, feasible = batch()
    del given["sample_id"], given["epoch"]
    loss = SelectiveLoss(3, feasible=feasible)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append((call(loss, given)[1], call(loss, given)[1]))
    (a, b), (c, d), (e, _) = found
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, e)


def test_every_part_of_the_key_counts():
    given, feasible = batch()
    first = call(SelectiveLoss(3, feasible=feasible), given)[1]
    for changed in ({"epoch": 4}, {"sample_id": given["sample_id"] + 1}):
        assert not torch.equal(
            first, call(SelectiveLoss(3, feasible=feasible), given, **changed)[1]
        )
    assert not torch.equal(first, call(SelectiveLoss(3, feasible=feasible, seed=98), given)[1])
    again = call(SelectiveLoss(3, feasible=feasible, seed=99 + 2**64), given)[1]
    assert torch.equal(first, again)
    by_row = call(SelectiveLoss(3, feasible=feasible), given, epoch=torch.full((ROWS,), 3))[1]
    assert torch.equal(first, by_row)


@pytest.mark.parametrize("draw_over", ["feasible", "unannotated"])
def test_top_is_the_likeliest(draw_over):
    given, feasible = batch(2)
    loss = SelectiveLoss(4, feasible=feasible, draw="top", draw_over=draw_over, margin=0)
    _, gradient = call(loss, given)
    g = given["likelihood"]
    drawable = given["labels"] == 0 if draw_over == "unannotated" else torch.ones_like(g).bool()
    top = top_ignore_set(
        inverse_weight=g.amax(1, keepdim=True) / g, drawable=drawable, num_ignore=4
    )
    assert torch.equal(gradient == 0, top & (given["labels"] == 0))
    assert torch.equal(gradient, call(loss, given, epoch=9)[1])


@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("unannotated", ["ignore", "negative"])
@pytest.mark.parametrize(
    ("made", "row"), [(CrossEntropyLoss, "ce"), (AsymmetricLoss, "asl")], ids=["ce", "asl"]
)
def test_rows_of_table_1(made, row, unannotated, margin):
    case = make(annotated=0.3)
    found = made(unannotated, margin=margin, reduction="none")(case.logits, case.label)
    names = {"ignore": "ignoring", "negative": "negatifying"}
    wanted = selective_loss(
        case.logits,
        label=case.label,
        object_id=case.object_id,
        feasible=case.feasible,
        ignored=None,
        loss=LossConfig(loss=f"{row}_{names[unannotated]}", margin=margin),
    ).per_row
    assert torch.equal(found, wanted)


def test_the_row_psl():
    case, prior = make(annotated=0.3), torch.linspace(0, 1, 131)
    config = LossConfig(loss="psl", psl_threshold=0.7, psl_topk=3)
    unannotated = case.label == 0
    ignored = psl_ignored(
        probability=case.logits.sigmoid(), unannotated=unannotated, prior=prior, loss=config
    )
    wanted = selective_loss(
        case.logits,
        label=case.label,
        object_id=case.object_id,
        feasible=case.feasible,
        ignored=ignored,
        loss=config,
    ).per_row
    loss = PartiallySelectiveLoss(prior, threshold=0.7, topk=3, reduction="none")
    assert torch.equal(loss(case.logits, case.label), wanted)
    assert (ignored.sum() > unannotated[:, prior > 0.7].sum()).item()


def test_losses_take_each_others_arguments():
    given, feasible = batch()
    for loss in (
        SelectiveLoss(3, feasible=feasible),
        SelectiveLoss(0),
        CrossEntropyLoss(),
        AsymmetricLoss(),
        PartiallySelectiveLoss(torch.full((ATTRIBUTES,), 0.4)),
    ):
        assert call(loss, given)[0].isfinite()
        assert "reduction='mean'" in repr(loss) and "margin=0.05" in repr(loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_of_logits_and_likelihoods(dtype):
    given, feasible = batch()
    loss = SelectiveLoss(3, feasible=feasible)
    given["logits"] = given["logits"].to(dtype)
    value, gradient = call(loss, given)
    assert gradient.dtype == dtype
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide, _ = call(loss, given, logits=given["logits"].double())
    assert value.item() == pytest.approx(wide.item(), rel=1e-5)
    narrow = given["likelihood"].to(dtype)
    rounded = call(loss, given, likelihood=narrow.double())[1]
    # Quotients are rounded to float32 once or twice, which changes no draw of this batch.
    assert torch.equal(call(loss, given, likelihood=narrow)[1], rounded)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS + UNSIGNED + FLOATS)
def test_types_of_labels_and_ids(dtype):
    given, feasible = batch()
    if dtype in UNSIGNED:
        given["labels"].clamp_(min=0)
    loss = SelectiveLoss(3, feasible=feasible)
    value, _ = call(loss, given)
    changed = {"labels": given["labels"].to(dtype)}
    if dtype not in FLOATS:
        changed |= {"object_id": given["object_id"].to(dtype)}
        changed |= {"epoch": torch.full((ROWS,), 3, dtype=dtype)}
    assert torch.equal(call(loss, given, **changed)[0], value)


def test_strided_inputs_and_gradients_of_the_likelihood():
    given, feasible = batch()
    loss = SelectiveLoss(3, feasible=feasible)
    value, gradient = call(loss, given)
    changed = {
        name: given[name].t().contiguous().t() for name in ("logits", "labels", "likelihood")
    }
    changed["likelihood"].requires_grad_()
    found = call(loss, given, **changed)
    assert torch.equal(found[0], value) and torch.equal(found[1], gradient)
    assert changed["likelihood"].grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sets", [True, False])
def test_no_rows(reduction, sets):
    given, feasible = batch(rows=0, sets=sets)
    loss = SelectiveLoss(3, feasible=feasible if sets else None, reduction=reduction)
    value, gradient = call(loss, given)
    assert value.shape == (() if reduction != "none" else (0,)) and gradient.shape == (
        0,
        ATTRIBUTES,
    )
    assert value.sum() == 0


def test_a_module_moves_and_is_copied():
    given, feasible = batch()
    loss = SelectiveLoss(3, feasible=feasible)
    value, _ = call(loss, given)
    assert loss.state_dict() == {} and not list(loss.parameters())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.float().eval()):
        assert torch.equal(call(other, given)[0], value)
    on_meta = copy.deepcopy(loss).to("meta")
    assert {buffer.device.type for buffer in on_meta.buffers()} == {"meta"}
    with pytest.raises(ValueError, match=r"call loss\.to"):
        call(on_meta, given)


def test_it_cannot_be_differentiated_twice():
    given, feasible = batch()
    logits = given.pop("logits").requires_grad_()
    value = SelectiveLoss(3, feasible=feasible)(logits, given.pop("labels"), **given)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(value, logits, create_graph=True)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["feasible", "unannotated"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_laws(seed, draw_over, sets):
    """Reductions agree; a row's loss is its own; the compiled operator gives the reference's."""
    given, feasible = batch(seed, sets=sets)
    table = feasible if sets else None
    made = {
        reduction: SelectiveLoss(4, feasible=table, draw_over=draw_over, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    }
    given["logits"] = given["logits"].float()
    rows, slope = call(made["none"], given)
    assert call(made["sum"], given)[0].item() == pytest.approx(rows.sum().item(), rel=1e-6)
    mean, mean_slope = call(made["mean"], given)
    assert mean.item() == pytest.approx(rows.mean().item(), rel=1e-6)
    torch.testing.assert_close(mean_slope * ROWS, slope)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(ROWS))
    moved = {n: v[order] if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    assert torch.equal(call(made["none"], moved)[0], rows[order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAL_KERNEL", "reference")
        choose.cache_clear()
        reference, exact = call(made["none"], given)
    choose.cache_clear()
    torch.testing.assert_close(rows, reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, exact, rtol=1e-4, atol=1e-6)


def changed_at(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[7] = value
    return tensor


REFUSED = {
    "logits of integers": ("logits", lambda t: t.long(), r"logits: torch.int64"),
    "logits of one row": ("logits", lambda t: t[0], r"logits: .*give floating \[B, A\]"),
    "no logits": ("logits", lambda t: t.sum(), r"logits: .*give floating \[B, A\]"),
    "narrow logits": ("logits", lambda t: t[:, :20], r"labels: .*\[9, 20\]"),
    "bool labels": ("labels", lambda t: t > 0, r"labels: torch.bool .*give integer or floating"),
    "complex labels": ("labels", lambda t: t.to(torch.complex64), r"labels: torch.complex64"),
    "labels of one row": ("labels", lambda t: t[0], r"labels: .*\[41\].*give .*\[9, 41\]"),
    "labels to broadcast": ("labels", lambda t: t[:1], r"labels: .*\[1, 41\].*give .*\[9, 41\]"),
    "label 2": ("labels", lambda t: changed_at(t, 2), r"labels: a value is not -1 \(absent\)"),
    "label 256": ("labels", lambda t: changed_at(t, 256), r"labels: a value is not -1"),
    "label 255": ("labels", lambda t: changed_at(t.clamp(0).byte(), 255), r"labels: a value is"),
    "label 0.5": ("labels", lambda t: changed_at(t.float(), 0.5), r"labels: a value is not -1"),
    "label NaN": ("labels", lambda t: changed_at(t.float(), torch.nan), r"labels: a value is not"),
    "no object": ("object_id", lambda _: None, r"object_id: missing"),
    "object -1": ("object_id", lambda t: changed_at(t, -1), r"object_id: an id is not in 0\.\.3"),
    "object 4": ("object_id", lambda t: changed_at(t, 4), r"object_id: an id is not in 0\.\.3"),
    "far object": ("object_id", lambda t: changed_at(t, 2**62), r"object_id: an id is not in"),
    "object 0.0": ("object_id", lambda t: t.float(), r"object_id: torch.float32"),
    "one object": ("object_id", lambda t: t[:1], r"object_id: .*\[1\].*give integer \[9\]"),
    "no likelihood": ("likelihood", lambda _: None, r"likelihood: missing, and 3 .*num_ignore 0"),
    "likelihood -1": ("likelihood", lambda t: changed_at(t, -1), r"likelihood: a value is neg"),
    "infinite likelihood": (
        "likelihood", lambda t: changed_at(t, torch.inf), r"likelihood: a value is negative or not"
    ),
    "likelihood NaN": (
        "likelihood", lambda t: changed_at(t, torch.nan), r"likelihood: a value is negative or not"
    ),
    "likelihood elsewhere": ("likelihood", lambda t: t + 1e-9, r"likelihood: a value outside"),
    "integral likelihood": ("likelihood", lambda t: t.long(), r"likelihood: torch.int64"),
    "likelihood of one row": ("likelihood", lambda t: t[:1], r"likelihood: .*\[1, 41\]"),
    "no sample": ("sample_id", lambda _: None, r"sample_id: missing; sample_id and epoch"),
    "no epoch": ("epoch", lambda _: None, r"epoch: missing; sample_id and epoch"),
    "samples 0.0": ("sample_id", lambda t: t.double(), r"sample_id: torch.float64"),
    "one sample": ("sample_id", lambda t: t[:1], r"sample_id: .*\[1\].*give integer \[9\]"),
    "epoch 0.5": ("epoch", lambda _: 0.5, r"epoch: torch.float32"),
    "one epoch": ("epoch", lambda _: torch.tensor([3]), r"epoch: .*\[1\].*give integer \[9\]"),
}  # fmt: skip


QUICK_COMPILED = ("logits of one row", "label 2", "far object", "no likelihood", "no epoch")


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, False) for name in REFUSED),
        *(
            pytest.param(name, True, marks=[] if name in QUICK_COMPILED else pytest.mark.slow)
            for name in REFUSED
        ),
    ],
)
def test_refused(name, compiled):
    given, feasible = batch(1)
    argument, change, message = REFUSED[name]
    given[argument] = change(given[argument])
    loss = SelectiveLoss(3, feasible=feasible)
    if compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=message):
        loss(given.pop("logits"), given.pop("labels"), **given)


def test_a_remedy_works():
    """Equal weights in the feasible set, as the message about an absent likelihood says."""
    given, feasible = batch(1)
    equal = torch.from_numpy(feasible.mask(ATTRIBUTES))[given["object_id"]].float()
    assert call(SelectiveLoss(3, feasible=feasible), given, likelihood=equal)[0] > 0
    assert call(SelectiveLoss(3), given, likelihood=torch.ones(ROWS, ATTRIBUTES))[0] > 0
    for num_ignore in (0, "all"):
        assert call(SelectiveLoss(num_ignore, feasible=feasible), given, likelihood=None)[0] > 0


def test_sets_beyond_the_logits_are_refused():
    given, feasible = batch(1)
    narrow = {n: given[n][:, :20] for n in ("logits", "labels", "likelihood")}
    with pytest.raises(ValueError, match=r"20 attributes, but the feasible sets name attribute"):
        call(SelectiveLoss(3, feasible=feasible), given, **narrow)
    # Fewer than there are logits is no error: nothing says how many there should be.
    wide = {n: torch.nn.functional.pad(given[n], (0, 9)) for n in narrow}
    loss = SelectiveLoss(3, feasible=feasible)
    assert call(loss, given, **wide)[0] > call(loss, given)[0]
    wide["likelihood"][2, -1] = 0.1
    with pytest.raises(ValueError, match="likelihood: a value outside"):
        call(loss, given, **wide)


def test_a_prior_that_does_not_fit_is_refused():
    given, _ = batch(1)
    with pytest.raises(ValueError, match="41 attributes on cpu, but the prior has 40"):
        call(PartiallySelectiveLoss(torch.zeros(40)), given)


PRIOR = torch.zeros(3)
SETTINGS = [
    (lambda: SelectiveLoss(-1), r"num_ignore is -1"),
    (lambda: SelectiveLoss(1.5), r"num_ignore is 1.5"),
    (lambda: SelectiveLoss(True), r"num_ignore is True"),
    (lambda: SelectiveLoss("some"), r"num_ignore is 'some'"),
    (lambda: SelectiveLoss(gammas=(1, 2, 4)), r"gammas is \(1, 2, 4\)"),
    (lambda: SelectiveLoss(gammas=(1, 2, 4, -7)), r"gammas: gamma_infeasible is -7"),
    (lambda: SelectiveLoss(gammas=(1, math.nan, 4, 7)), r"gammas: gamma_negative is nan"),
    (lambda: SelectiveLoss(margin=1), r"margin is 1"),
    (lambda: SelectiveLoss(margin=-0.1), r"margin is -0.1"),
    (lambda: SelectiveLoss(draw_over="all"), r"draw_over is 'all'"),
    (lambda: SelectiveLoss(draw="best"), r"draw is 'best'"),
    (lambda: SelectiveLoss(reduction="median"), r"reduction is 'median'; give one of mean, sum"),
    (lambda: SelectiveLoss(feasible=np.ones((2, 3))), r"feasible is of type ndarray; give"),
    (lambda: SelectiveLoss(seed=1.5), r"seed is 1.5"),
    (lambda: CrossEntropyLoss("drop"), r"unannotated is 'drop'; give one of ignore, negative"),
    (lambda: AsymmetricLoss(gammas=(1, 2)), r"gammas is \(1, 2\)"),
    (lambda: AsymmetricLoss(gammas=(1, 2, 4, 4)), r"gammas is \(1, 2, 4, 4\)"),
    (lambda: PartiallySelectiveLoss(PRIOR, threshold=2), r"threshold is 2"),
    (lambda: PartiallySelectiveLoss(PRIOR, topk=-1), r"topk is -1"),
    (lambda: PartiallySelectiveLoss(PRIOR + 2), r"prior: .*each in 0\.\.1"),
    (lambda: PartiallySelectiveLoss(PRIOR[None]), r"prior: torch.float32 \[1, 3\]"),
]


@pytest.mark.parametrize(("make_loss", "message"), SETTINGS, ids=[m for _, m in SETTINGS])
def test_refused_settings(make_loss, message):
    with pytest.raises(ValueError, match=message):
        make_loss()


@pytest.mark.parametrize("kind", ["plain", "keyed", "strided", "top", "psl", "none"])
def test_opcheck(kind):
    """What is traced of the checks fits what they return, in shape, type and stride."""
    given, feasible = batch(3, sets=kind != "plain")
    given["labels"] = given["labels"].to(torch.int8)
    if kind == "strided":
        given |= {n: given[n].t().contiguous().t() for n in ("labels", "likelihood")}
    loss = {
        "top": SelectiveLoss(3, feasible=feasible, draw="top"),
        "psl": PartiallySelectiveLoss(torch.full((ATTRIBUTES,), 0.4)),
        "plain": SelectiveLoss(3),
        "none": SelectiveLoss("all", feasible=feasible),
    }.get(kind, SelectiveLoss(3, feasible=feasible))
    key = [given["sample_id"], torch.full((ROWS,), 3)]
    inputs = [given["object_id"], given["likelihood"], *key, loss.feasible_mask, loss.prior]
    arguments = given["logits"].float(), given["labels"], inputs, 99, loss.config.model_dump_json()
    torch.library.opcheck(compiled_inputs, arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sets", [True, False])
def test_on_a_gpu_without_waiting_for_it(sets):
    given, feasible = batch(1, sets=sets)
    given |= {"logits": given["logits"].float(), "epoch": torch.full((ROWS,), 3)}
    loss = SelectiveLoss(3, feasible=feasible if sets else None)
    value, gradient = call(loss, given)
    there = {name: tensor.cuda() for name, tensor in given.items()}
    loss = loss.cuda()
    call(loss, there)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, slope = call(loss, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), value)
    torch.testing.assert_close(slope.cpu(), gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(slope.cpu() == 0, gradient == 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_bad_value_on_a_gpu_is_an_assertion_there():
    code = (
        "import torch, vlal_dist as vlal; z = torch.zeros(2, 3).cuda();"
        "vlal.SelectiveLoss(0)(z, z + 5); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "device-side assert" in done.stderr


ignores_deprecated = pytest.mark.filterwarnings(  # inductor itself uses it
    "ignore:.torch.jit.script:DeprecationWarning"
)
KINDS = list(itertools.product([True, False], [True, False], ["mean", "sum"]))
QUICK = [(True, True, "mean")]


@pytest.mark.parametrize(
    ("sets", "keyed", "reduction"),
    [pytest.param(*kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS],
)
@ignores_deprecated
def test_inductor(sets, keyed, reduction):
    """A step with the loss inside, forward and backward, for batches of several sizes."""
    torch._dynamo.reset()
    _, feasible = batch(0, sets=sets)
    loss = SelectiveLoss(5, feasible=feasible if sets else None, reduction=reduction)

    def step(logits, labels, **rest):
        return loss(logits * 2, labels, **rest) + logits.square().sum() * 1e-3

    # Each compilation takes seconds: one for all sizes by default.
    quick = (sets, keyed, reduction) in QUICK
    compiled = torch.compile(step, fullgraph=True, dynamic=True if quick else None)
    for rows, epoch in ((ROWS, 2), (5, 3), (17, 4), (33, 5)):
        given, _ = batch(0, rows, sets=sets)
        given |= {"logits": given["logits"].float(), "epoch": epoch}
        if not keyed:
            del given["sample_id"], given["epoch"]
        torch.manual_seed(rows)
        value, gradient = call(step, given)
        torch.manual_seed(rows)
        found, slope = call(compiled, given)
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
        torch.testing.assert_close(slope, gradient, rtol=1e-6, atol=1e-7)
        assert torch.equal(slope == 0, gradient == 0)
    with pytest.raises(ValueError, match="labels: a value is not -1"):
        call(compiled, given, labels=changed_at(given["labels"], 2))
    torch._dynamo.reset()


@pytest.mark.slow
@ignores_deprecated
def test_inductor_of_the_other_losses():
    given, _ = batch(0, sets=False)
    given["logits"] = given["logits"].float()
    for loss in (
        CrossEntropyLoss("negative"),
        AsymmetricLoss(),
        PartiallySelectiveLoss(torch.full((ATTRIBUTES,), 0.4)),
        SelectiveLoss(3, draw="top"),
    ):
        torch._dynamo.reset()
        value, gradient = call(loss, given)
        found, slope = call(torch.compile(loss, fullgraph=True), given)
        torch.testing.assert_close(found, value)
        assert torch.equal(slope, gradient)
    torch._dynamo.reset()
