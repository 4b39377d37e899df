"""Batches for the fused operator, its backends, and the right answers in float64.

A backend is a function with the signature of `cpu.run`; a new one joins `BACKENDS` and is held to
every test that is parametrised over them. Dense forms are made here by loops of their own, not by
the product's helpers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels import emulated
from vlal_dist.kernels import cpu, cuda, reference
from vlal_dist.kernels.build import VARIANTS, compiler, instruction_set
from vlal_dist.kernels.inputs import Draw, FeasibleTable, Labels
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.method.selective_loss import assign_terms, selective_loss

PAPER = (1.0, 2.0, 4.0, 7.0)
GAMMAS = [PAPER, (0.0, 0.0, 0.0, 0.0), (1.0, 2.0, 4.0, 4.0), (0.5, 3.3, 0.2, 7.5)]
MODES = ("draw", "list", "mask", "ignore", "negatify")
SEEDS = (0, 99, -1, -(2**63), 2**63 - 1, 2**40 + 7)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Backend(NamedTuple):
    """A way to run the operator.

    Attributes:
        name: as tests print it.
        device: where its tensors live.
        run: as `cpu.run`, without `variant` and `threads`.
    """

    name: str
    device: str
    run: Callable[..., Outputs]


def instruction_sets() -> list[str]:
    """Variants that this processor runs, the widest first; none without a compiler."""
    names = list(VARIANTS)
    return names[names.index(instruction_set()) :] if compiler() else []


def on_gpu(tensors: dict[str, Tensor | None], **settings) -> Outputs:
    """As the operator runs a batch of a GPU."""
    logits = tensors["logits"]
    assert logits is not None
    backend = reference if logits.dtype == torch.float64 else cuda
    return backend.run(tensors, **settings)


ON_CPU = [
    Backend(f"cpu-{name}", "cpu", partial(cpu.run, variant=name)) for name in instruction_sets()
]
FUSED = [*ON_CPU, Backend("cuda-emulated", "cpu", emulated.run)]
"""The compiled ones: the same draw bit for bit, and the attributes drawn in `drawn_out`."""
EQUAL = [
    [b for b in ON_CPU if ("-mfma" in VARIANTS[b.name.removeprefix("cpu-")]) == fma]
    for fma in (True, False)
]
"""Groups of them whose losses and gradients too are equal bit for bit."""
if torch.cuda.is_available():
    FUSED.append(Backend("cuda", "cuda", on_gpu))
BACKENDS = [*FUSED, Backend("reference", "cpu", reference.run)]


def parametrized(backends: list[Backend]) -> pytest.MarkDecorator:
    """A test for each of them; those of the emulated programs are compiled one by one."""
    slow = [pytest.mark.long]
    params = [
        pytest.param(b, id=b.name, marks=slow if b.name == "cuda-emulated" else [])
        for b in backends
    ]
    return pytest.mark.parametrize("backend", params)


on_backends, on_fused = parametrized(BACKENDS), parametrized(FUSED)


class Case(NamedTuple):
    """A batch; `inputs.py` and `selective_loss.py` describe the tensors.

    Attributes:
        label: dense; `labels` gives CSR.
        ignored: bool [B, A], any attributes; `drawn` gives it as a list.
    """

    logits: Tensor
    label: Tensor
    object_id: Tensor
    feasible: FeasibleTable
    weight_indptr: Tensor
    inverse_weight: Tensor
    uid: Tensor
    visit: Tensor
    seed: Tensor
    ignored: Tensor
    row_weight: Tensor | None = None

    def rows(self, which: Tensor | slice) -> "Case":
        """The same with some of the rows, in that order."""
        picked = torch.arange(len(self.logits))[which]
        bounds = self.weight_indptr.tolist()
        parts = [self.inverse_weight[bounds[row] : bounds[row + 1]] for row in picked.tolist()]
        weight = None if self.row_weight is None else self.row_weight[picked]
        return self._replace(
            **{name: getattr(self, name)[picked] for name in _BY_ROW},
            weight_indptr=indptr([len(part) for part in parts]),
            inverse_weight=torch.cat([self.inverse_weight[:0], *parts]),
            row_weight=weight,
        )

    def to(self, dtype: torch.dtype) -> "Case":
        """The same with logits of another type."""
        return self._replace(logits=self.logits.to(dtype))


_BY_ROW = ("logits", "label", "object_id", "uid", "visit", "ignored")


def indptr(lengths: list[int]) -> Tensor:
    """Where rows of these lengths begin, and the end."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def make(
    rows: int = 9,
    attributes: int = 131,
    *,
    objects: int = 5,
    density: float = 0.4,
    annotated: float = 0.1,
    spread: float = 5.0,
    seed: int = 0,
    draw_seed: int = -3,
) -> Case:
    """A random batch; the first object has no feasible attribute and the second has all.

    One likelihood in ten cannot be drawn. Names and visits use all of their bits.
    """
    g = torch.Generator().manual_seed(seed)
    table = torch.rand(objects, attributes, generator=g) < density
    table[:1], table[1:2] = False, True
    object_id = torch.randint(0, objects, (rows,), generator=g)
    lengths = table.sum(1)[object_id].tolist()
    inverse_weight = torch.exp(torch.rand(sum(lengths), generator=g) * 12)
    odd = torch.tensor([torch.inf, 0.0, torch.nan, -1.0])
    odd = odd[torch.randint(0, 4, inverse_weight.shape, generator=g)]
    inverse_weight = torch.where(
        torch.rand(inverse_weight.shape, generator=g) < 0.1, odd, inverse_weight
    )
    label = torch.randint(0, 2, (rows, attributes), generator=g) * 2 - 1
    label[torch.rand(rows, attributes, generator=g) >= annotated] = 0
    bits = torch.randint(-(2**63), 2**63 - 1, (rows, 2), generator=g)
    return Case(
        logits=torch.randn(rows, attributes, generator=g) * spread,
        label=label.to(torch.int8),
        object_id=object_id,
        feasible=FeasibleTable(
            indptr(table.sum(1).tolist()), table.nonzero()[:, 1].to(torch.int32)
        ),
        weight_indptr=indptr(lengths),
        inverse_weight=inverse_weight,
        uid=bits[:, 0].clone(),
        visit=bits[:, 1] >> 20,
        seed=torch.tensor([draw_seed]),
        ignored=torch.rand(rows, attributes, generator=g) < 0.3,
    )


def away_from(case: Case, margin: float, distance: float = 1e-2) -> Case:
    """The same with no logit near p = m, where the loss has a kink and relative errors no bound."""
    near = (case.logits.double().sigmoid() - margin).abs() < distance
    return case._replace(logits=torch.where(near, 1.0, case.logits))


def labels(case: Case) -> Labels:
    """The annotations as CSR."""
    codes = [[a * 2 + (y > 0) for a, y in enumerate(row) if y] for row in case.label.tolist()]
    flat = torch.tensor([code for row in codes for code in row], dtype=torch.int32)
    return Labels(indptr([len(row) for row in codes]), flat)


def drawn(case: Case, width: int | None = None) -> Tensor:
    """`ignored` as int32 [B, width], -1 where there are fewer."""
    ids = [row.nonzero()[:, 0].tolist() for row in case.ignored]
    width = max(map(len, ids), default=0) + 1 if width is None else width
    padded = [row + [-1] * (width - len(row)) for row in ids]
    return torch.tensor(padded, dtype=torch.int32).reshape(len(ids), width)


def draw_of(case: Case, num_ignore: int = 7, over_unannotated: bool = False) -> Draw:
    """What `selective_loss` is given for a draw."""
    return Draw(
        weight_indptr=case.weight_indptr,
        inverse_weight=case.inverse_weight,
        num_ignore=num_ignore,
        over_unannotated=over_unannotated,
        uid=case.uid,
        visit=case.visit,
        seed=case.seed,
    )


def tensors(case: Case, mode: str, *, sparse: bool = False) -> dict[str, Tensor | None]:
    """What a backend is given."""
    given: dict[str, Tensor | None] = {
        "logits": case.logits,
        "object_id": case.object_id,
        "feasible_indptr": case.feasible.indptr,
        "feasible_index": case.feasible.indices,
        "row_weight": case.row_weight,
    }
    if sparse:
        given["label_indptr"], given["label_code"] = labels(case)
    else:
        given["label"] = case.label
    if mode == "draw":
        names = ("weight_indptr", "inverse_weight", "uid", "visit", "seed")
        given |= {name: getattr(case, name) for name in names}
    elif mode == "list":
        given["drawn"] = drawn(case)
    elif mode == "mask":
        given["ignored"] = case.ignored
    return given


def run(
    backend: Backend,
    case: Case,
    mode: str = "draw",
    *,
    sparse: bool = False,
    extra: dict[str, Tensor] | None = None,
    **settings,
) -> Outputs:
    """Outputs of a backend; settings not given are the defaults of `SETTINGS`."""
    given = {**tensors(case, mode, sparse=sparse), **(extra or {})}
    moved = {n: None if t is None else t.to(backend.device) for n, t in given.items()}
    outputs = backend.run(moved, mode=mode, **{**SETTINGS, **settings})
    for name, tensor in (extra or {}).items():
        tensor.copy_(moved[name])
    losses, gradient, sums, counts = (output.cpu() for output in outputs)
    return losses, gradient, sums, counts


SETTINGS = {
    "num_ignore": 7,
    "over_unannotated": False,
    "gammas": PAPER,
    "margin": 0.0,
    "detach_focal": False,
}


def feasible_mask(case: Case) -> Tensor:
    """Omega_o of each row, bool [B, A]."""
    mask = torch.zeros(case.label.shape, dtype=torch.bool)
    bounds = case.feasible.indptr.tolist()
    for row, o in enumerate(case.object_id.tolist()):
        mask[row, case.feasible.indices[bounds[o] : bounds[o + 1]].long()] = True
    return mask


def oracle_mask(
    case: Case, mode: str = "draw", *, num_ignore: int = 7, over_unannotated: bool = False
) -> Tensor:
    """Omega_Ignore by `method/`, annotated attributes included, bool [B, A]."""
    feasible = feasible_mask(case)
    if mode in ("list", "mask"):
        return case.ignored
    if mode != "draw":
        return torch.full_like(feasible, mode == "ignore")
    weight = torch.zeros(feasible.shape)
    weight[feasible] = case.inverse_weight  # both go by row, then by attribute
    return sample_ignore_set(
        inverse_weight=weight,
        drawable=feasible & (case.label == 0) if over_unannotated else feasible,
        num_ignore=None if num_ignore < 0 else num_ignore,
        uid=case.uid,
        visit=case.visit,
        seed=int(case.seed),
    )


def oracle(
    case: Case,
    mode: str = "draw",
    *,
    num_ignore: int = 7,
    over_unannotated: bool = False,
    **settings,
) -> Outputs:
    """Losses, gradient, sums and counts by `method/`, in float64 of the same logits."""
    ignored = oracle_mask(case, mode, num_ignore=num_ignore, over_unannotated=over_unannotated)
    term = assign_terms(case.label, feasible_mask(case), ignored)
    z = case.logits.detach().double().requires_grad_()
    loss = selective_loss(z, term, row_weight=case.row_weight, **{"gammas": PAPER, **settings})
    (gradient,) = torch.autograd.grad(loss.per_row.sum(), z)
    return loss.per_row.detach(), gradient, loss.sums, loss.counts


def same_bits(found: Outputs, wanted: Outputs) -> bool:
    """Whether all four are equal in every bit, NaN included."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        for a, b in zip(map(plain, found), map(plain, wanted), strict=True)
    )


def plain(tensor: Tensor) -> Tensor:
    """A type that numpy knows, with the same bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
