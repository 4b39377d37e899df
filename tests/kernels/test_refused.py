"""Values that the operator does not take: every backend refuses them, and reads nothing beyond."""

import math

import pytest
import torch

from tests.fixtures.loss_batches import (
    Backend,
    draw_of,
    drawn,
    indptr,
    labels,
    loss_config,
    make,
    on_backends,
    run,
    tensors,
)
from tests.kernels import emulated_cuda
from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cpu
from vlal_dist.kernels.arguments import PROBLEMS, Draw, FeasibleTable, Labels
from vlal_dist.kernels.backend import choose
from vlal_dist.kernels.operator import compiled_loss, selective_loss

FAR = 2**40
LOSS = loss_config()


def changed(tensor, where, value):
    """A copy that holds another value there."""
    copy = tensor.clone()
    copy[where] = value
    return copy


def case():
    """Rows of all objects, each with a set, weights and annotations."""
    made = make(rows=9, attributes=131, annotated=0.2)
    object_id = torch.arange(9) % 4 + 1
    lengths = made.feasible.indptr.diff()[object_id].tolist()
    return made._replace(
        object_id=object_id,
        weight_indptr=indptr(lengths),
        inverse_weight=torch.linspace(1, 50, sum(lengths)),
        row_weight=torch.linspace(0.5, 2, 9),
    )


def given(mode="draw", *, sparse=False, **change):
    """What a backend is given, with some tensors replaced."""
    return {**tensors(case(), mode, sparse=sparse), **change}


CASE = case()
SETS, PTR = CASE.feasible.indices, CASE.feasible.indptr
CSR = labels(CASE)
PAIR = int(CSR.code[CSR.indptr[3]])  # the first annotation of row 3
DAMAGE = {
    # name: (mode, what replaces what, the start of the text, the row on a CPU; None: any)
    "object beyond": ("draw", {"object_id": changed(CASE.object_id, 3, 5)}, "object_id", 3),
    "object far away": ("mask", {"object_id": changed(CASE.object_id, 3, FAR)}, "object_id", 3),
    "object negative": ("ignore", {"object_id": changed(CASE.object_id, 0, -1)}, "object_id", 0),
    "no objects": (
        "list",
        {"feasible_indptr": PTR[:1], "feasible_index": SETS[:0]},
        "object_id",
        0,
    ),
    "set id beyond": ("negatify", {"feasible_index": changed(SETS, -1, 131)}, "feasible", None),
    "set id far away": ("draw", {"feasible_index": changed(SETS, -1, 2**31 - 1)}, "feasible", None),
    "set id negative": ("draw", {"feasible_index": changed(SETS, 0, -7)}, "feasible", None),
    "set id twice": ("draw", {"feasible_index": changed(SETS, 1, int(SETS[0]))}, "feasible", None),
    "set not ascending": ("mask", {"feasible_index": SETS.flip(0)}, "feasible", None),
    "offsets beyond": ("draw", {"feasible_indptr": changed(PTR, -1, FAR)}, "feasible", None),
    "offsets too short": ("draw", {"feasible_indptr": changed(PTR, -1, 200)}, "feasible", None),
    "offsets falling": ("list", {"feasible_indptr": changed(PTR, 2, 10**6)}, "feasible", None),
    "offsets negative": ("draw", {"feasible_indptr": changed(PTR, 1, -FAR)}, "feasible", None),
    "offsets from 1": ("mask", {"feasible_indptr": changed(PTR, 0, 1)}, "feasible", None),
    "label 2": ("draw", {"label": changed(CASE.label, (4, 130), 2)}, "label", 4),
    "label -2": ("mask", {"label": changed(CASE.label, (8, 0), -2)}, "label", 8),
    "label -128": ("ignore", {"label": changed(CASE.label, (2, 64), -128)}, "label", 2),
    "label 127": ("list", {"label": changed(CASE.label, (2, 3), 127)}, "label", 2),
    "code beyond": ("draw", {"label_code": changed(CSR.code, -1, 262)}, "label", None),
    "code far away": ("draw", {"label_code": changed(CSR.code, -1, 2**31 - 1)}, "label", None),
    "code negative": ("mask", {"label_code": changed(CSR.code, 0, -1)}, "label", None),
    "annotated twice": (
        "draw",
        {"label_code": changed(CSR.code, CSR.indptr[3] + 1, PAIR)},
        "label",
        None,
    ),
    "present and absent": (
        "mask",
        {"label_code": changed(CSR.code, CSR.indptr[3] + 1, PAIR ^ 1)},
        "label",
        None,
    ),
    "label offsets beyond": ("draw", {"label_indptr": changed(CSR.indptr, -1, FAR)}, "label", None),
    "label offsets falling": ("draw", {"label_indptr": changed(CSR.indptr, 4, 0)}, "label", None),
    "labels left over": ("list", {"label_indptr": CSR.indptr.clamp(max=9)}, "label", None),
    "weights beyond": (
        "draw",
        {"weight_indptr": changed(CASE.weight_indptr, -1, FAR)},
        "weight_indptr",
        None,
    ),
    "weights of other rows": (
        "draw",
        {"weight_indptr": changed(CASE.weight_indptr, 4, int(CASE.weight_indptr[4]) - 1)},
        "weight_indptr",
        None,
    ),
    "weights left over": (
        "draw",
        {"inverse_weight": torch.ones(len(CASE.inverse_weight) + 1)},
        "weight_indptr",
        None,
    ),
    "a list beyond": ("list", {"drawn": changed(drawn(CASE), (5, 0), 131)}, "drawn", 5),
    "a list far away": ("list", {"drawn": changed(drawn(CASE), (5, 0), 2**31 - 1)}, "drawn", 5),
    "a list below -1": ("list", {"drawn": changed(drawn(CASE), (6, 1), -2)}, "drawn", 6),
    "row weight negative": (
        "draw",
        {"row_weight": changed(CASE.row_weight, 7, -1.0)},
        "row_weight",
        7,
    ),
    "row weight NaN": (
        "mask",
        {"row_weight": changed(CASE.row_weight, 7, math.nan)},
        "row_weight",
        7,
    ),
    "row weight infinite": (
        "ignore",
        {"row_weight": changed(CASE.row_weight, 1, math.inf)},
        "row_weight",
        1,
    ),
}
for value in (0.999, 0.0, -1.0, math.nan, -math.inf):
    change = {"inverse_weight": changed(CASE.inverse_weight, -1, value)}
    DAMAGE[f"weight {value}"] = ("draw", change, "inverse_weight", None)
    dense = torch.full(CASE.label.shape, 2.0)
    dense[:, SETS[PTR[1] : PTR[2]].long()] = value  # the second object has all attributes
    change = {"inverse_weight": dense, "weight_indptr": None}
    DAMAGE[f"dense weight {value}"] = ("draw", change, "inverse_weight", 0)


@on_backends
@pytest.mark.parametrize("name", DAMAGE)
def test_a_row_is_refused(backend, name):
    mode, change, start, row = DAMAGE[name]
    sparse = any("label_" in key for key in change)
    moved = {
        key: None if t is None else t.to(backend.device)
        for key, t in given(mode, sparse=sparse, **change).items()
    }
    if backend.device == "cuda":
        pytest.skip("ends the process: test_cuda.py")
    with pytest.raises(ValueError) as caught:
        backend.run(moved, mode, loss_config())
    text = next(text for text in PROBLEMS if text.startswith(f"{start}: "))
    assert text in str(caught.value)
    if backend.name.startswith("cpu") and row is not None:
        assert str(caught.value) == f"{text} (row {row})"


@on_backends
def test_what_fits_is_taken(backend):
    """The batch that the damage was done to; weights that are not read may hold anything."""
    for mode in ("draw", "list", "mask", "ignore", "negatify"):
        for sparse in (False, True):
            run(backend, CASE, mode, sparse=sparse)
    spoilt = CASE._replace(inverse_weight=torch.zeros_like(CASE.inverse_weight))
    for num_ignore in (0, "all"):
        run(backend, spoilt, num_ignore=num_ignore)


def test_the_first_row_is_named_whatever_the_threads():
    many = make(rows=2000, attributes=131)
    wrong = changed(many.label, ([700, 1500], 5), 2)
    for threads in (1, 2, 7):
        with pytest.raises(ValueError, match=r"\(row 700\)"):
            cpu.run(
                {**tensors(many, "draw"), "label": wrong}, "draw", LossConfig(), threads=threads
            )


def test_a_set_larger_than_announced_is_refused_on_a_gpu():
    """`largest` decides how much shared memory a row has."""
    backend = Backend("emulated", "cpu", emulated_cuda.run)
    largest = int(PTR.diff().max())
    backend.run(given(), "draw", loss_config(), largest=largest)
    with pytest.raises(ValueError, match=r"^selective_loss: feasible: "):
        backend.run(given(), "draw", loss_config(), largest=largest - 1)


@pytest.fixture(params=["cpu", "reference"])
def forced(request, monkeypatch):
    monkeypatch.setenv("VLAL_KERNEL", request.param)
    choose.cache_clear()
    yield request.param
    choose.cache_clear()


def call(**change):
    arguments = {
        "label": CASE.label,
        "object_id": CASE.object_id,
        "feasible": CASE.feasible,
        "ignored": draw_of(CASE),
        "loss": LOSS,
    }
    logits = change.pop("logits", CASE.logits)
    return selective_loss(logits, **{**arguments, **change})


WRONG = {
    "logits": ({"logits": None}, TypeError, "^logits: NoneType"),
    "logits of numpy": ({"logits": CASE.logits.numpy()}, TypeError, "^logits: ndarray"),
    "sparse logits": ({"logits": CASE.logits.to_sparse()}, ValueError, "^logits: .*sparse"),
    "meta logits": ({"logits": CASE.logits.to("meta")}, ValueError, "^logits: on meta"),
    "label": ({"label": None}, TypeError, "^label: None; give a tensor"),
    "label as a list": ({"label": CASE.label.tolist()}, TypeError, "^label: list"),
    "label of one row": ({"label": CASE.label[0]}, ValueError, r"^label: torch.int8 \[131\]"),
    "half of CSR": ({"label": Labels(CSR.indptr, None)}, TypeError, "^label_code: None"),
    "object_id": ({"object_id": None}, TypeError, "^object_id: None"),
    "meta object": ({"object_id": CASE.object_id.to("meta")}, ValueError, "^object_id: .* on meta"),
    "feasible": ({"feasible": (PTR, SETS)}, TypeError, "give a FeasibleTable"),
    "no offsets": ({"feasible": FeasibleTable(PTR[:0], SETS)}, ValueError, "^feasible_indptr"),
    "sets in two dimensions": (
        {"feasible": FeasibleTable(PTR, SETS[None])},
        ValueError,
        "^feasible_index",
    ),
    "largest": ({"feasible": CASE.feasible._replace(largest=-1)}, ValueError, "^feasible.largest"),
    "ignored": ({"ignored": "all"}, TypeError, "^ignored: str"),
    "a number drawn": ({"ignored": torch.tensor(3, dtype=torch.int32)}, ValueError, "^drawn"),
    "no seed": ({"ignored": draw_of(CASE)._replace(seed=None)}, TypeError, "^seed: None"),
    "no weights": ({"ignored": Draw(None, None, *draw_of(CASE)[2:])}, TypeError, "^inverse_weight"),
    "loss": ({"loss": None}, TypeError, "give a LossConfig"),
    "kernel": ({"kernel": "cuda"}, ConfigError, "^kernel is 'cuda'; give one of auto, reference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_is_refused(forced, name):
    change, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call(**change)


def test_probabilities_are_no_inverse_weights(forced):
    """Taken for inverse weights they would draw the least likely attributes."""
    likelihood = torch.softmax(CASE.inverse_weight, 0)
    with pytest.raises(ValueError, match="give max likelihood / likelihood"):
        call(ignored=draw_of(CASE)._replace(inverse_weight=likelihood))


def test_values_are_checked_under_compile(forced):
    torch._dynamo.reset()
    step = torch.compile(
        lambda **change: call(**change).per_row.sum(), fullgraph=True, backend="eager"
    )
    step(label=CASE.label)
    with pytest.raises(ValueError, match=r"^label: a value is not -1, 0 or \+1"):
        step(label=changed(CASE.label, (0, 0), 2))
    with pytest.raises(ValueError, match=r"^object_id: an id is not an object"):
        step(label=CASE.label, object_id=changed(CASE.object_id, 0, FAR))
    torch._dynamo.reset()


def test_a_view_of_other_signs_is_read_with_them(forced):
    """The imaginary part of a conjugate has its sign in the view, not in its memory."""
    one = case().rows(slice(0, 1))
    pair = one._replace(
        logits=torch.tensor([[0.7 - 1.3j]]).conj().imag,
        label=torch.ones(1, 1, dtype=torch.int8),
        feasible=FeasibleTable(indptr([1]), torch.zeros(1, dtype=torch.int32)),
        object_id=torch.zeros(1, dtype=torch.int64),
        ignored=torch.zeros(1, 1, dtype=torch.bool),
    )
    assert pair.logits.is_neg()
    given = {"label": pair.label, "object_id": pair.object_id, "feasible": pair.feasible}
    found = [
        selective_loss(z, **given, ignored=pair.ignored, loss=loss_config()).per_row
        for z in (pair.logits, torch.tensor([[1.3]]))
    ]
    assert torch.equal(*found)


def test_the_registered_operator_is_checked_too(forced):
    """`torch.ops.vlal.selective_loss` is what a compiled program calls."""
    with pytest.raises(TypeError, match=r"^label: None"):
        compiled_loss(CASE.logits, [None] * 14, [0.0] * 6, [1, 0, 0], "mask", "auto")
