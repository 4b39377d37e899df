"""Made-up batches and the ways to their loss that selective_loss.py compares.

Legend: B rows, A attributes.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlal_dist.config.sections import LossConfig
from vlal_dist.kernels.arguments import Draw, FeasibleTable
from vlal_dist.kernels.operator import selective_loss

Way = Callable[[], None]
RATIOS = {
    "vs_paper_way": ("paper", "ours"),
    "vs_eager": ("eager", "ours"),
    "vs_psl": ("psl", "ours_loss"),
    "vs_compile_draw": ("compile_draw", "ours"),
    "vs_compile_loss": ("compile_loss", "ours_loss"),
}
OBJECTS, LOSS = 50, LossConfig()
K, GAMMAS, MARGIN = 30, LOSS.gammas, LOSS.margin


@dataclass
class Data:
    """One batch, in the forms that the ways take; B rows, A attributes."""

    logits: Tensor
    label: Tensor
    object_id: Tensor
    table: FeasibleTable
    draw: Draw
    feasible: Tensor
    weight: Tensor
    mask: Tensor
    drawn: Tensor

    def to(self, device: str, dtype: torch.dtype) -> "Data":
        """The same on a device, its logits of a type."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
            elif isinstance(value, tuple):
                parts = [v.to(device) if isinstance(v, Tensor) else v for v in value]
                moved[name] = type(value)(*parts)
        logits = self.logits.detach().to(device, dtype).requires_grad_()
        return replace(self, **{**moved, "logits": logits})


def make(rows: int, attributes: int) -> Data:
    """A made-up batch from a seed."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(*((90, 271) if attributes < 10_000 else (300, 601)), OBJECTS)
    lists = [np.sort(rng.choice(attributes, size, replace=False)) for size in sizes]
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    object_id = rng.integers(0, OBJECTS, rows)
    row_indptr = np.concatenate([[0], np.cumsum(sizes[object_id])])
    inverse = np.exp(rng.exponential(2.0, row_indptr[-1])).astype(np.float32)
    row = np.repeat(np.arange(rows), sizes[object_id])
    column = np.concatenate([lists[one] for one in object_id])
    feasible = torch.zeros(rows, attributes, dtype=torch.bool)
    weight = torch.zeros(rows, attributes)
    feasible[row, column] = True
    weight[row, column] = torch.from_numpy(1 / inverse)
    label = torch.zeros(rows, attributes, dtype=torch.int8)
    places = torch.from_numpy(rng.integers(0, attributes, (rows, 4)))
    label.scatter_(1, places, torch.tensor([[1, 1, -1, -1]], dtype=torch.int8).expand(rows, 4))
    draw = Draw(
        torch.from_numpy(row_indptr.astype(np.int64)),
        torch.from_numpy(inverse),
        torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, rows)),
        torch.zeros(rows, dtype=torch.int64),
        torch.tensor([1]),
    )
    table = FeasibleTable(
        torch.from_numpy(indptr.astype(np.int64)),
        torch.from_numpy(np.concatenate(lists).astype(np.int32)),
        int(sizes.max()),
    )
    logits = (torch.randn(rows, attributes) * 3 - 2).requires_grad_()
    data = Data(
        logits,
        label,
        torch.from_numpy(object_id),
        table,
        draw,
        feasible,
        weight,
        label == 2,
        places,
    )
    data.mask = races(data.weight)
    data.drawn = data.mask.nonzero()[:, 1].view(rows, K).to(torch.int32)
    return data


def races(weight: Tensor) -> Tensor:
    """Exponential races in torch; a weight of 0 is never drawn."""
    key = torch.empty_like(weight).exponential_() / weight
    smallest = key.topk(K, dim=1, largest=False).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, smallest, True)


def choices(data: Data) -> Tensor:
    """The paper's Fig. 3 to the letter: one call of numpy for each row."""
    mask = np.zeros(data.weight.shape, dtype=bool)
    weight, feasible = data.weight.cpu().numpy().astype(np.float64), data.feasible.cpu().numpy()
    for row in range(len(mask)):
        members = np.flatnonzero(feasible[row])
        chance = weight[row, members]
        mask[row, np.random.choice(members, K, replace=False, p=chance / chance.sum())] = True
    return torch.from_numpy(mask).to(data.weight.device)


def authors_loss(z: Tensor, label: Tensor, feasible: Tensor, ignored: Tensor) -> Tensor:
    """Shaped as the authors' and ASL's code: sigmoid, clip, clamp, one focal weight."""
    positive, negative, unknown = label == 1, label == -1, label == 0
    p = torch.sigmoid(z)
    q = (1 - p + MARGIN).clamp(max=1)
    entropy = positive * torch.log(p.clamp(min=1e-8)) + ~positive * torch.log(q.clamp(min=1e-8))
    with torch.no_grad():
        weight = (
            torch.pow(1 - p, GAMMAS[0]) * positive
            + torch.pow(1 - q, GAMMAS[1]) * negative
            + torch.pow(1 - q, GAMMAS[2]) * (unknown & feasible & ~ignored)
            + torch.pow(1 - q, GAMMAS[3]) * (unknown & ~feasible)
        )
    return -(weight * entropy).sum()


def lean_loss(z: Tensor, label: Tensor, feasible: Tensor, ignored: Tensor) -> Tensor:
    """As few operations as torch needs."""
    gamma = torch.where(feasible, GAMMAS[2], GAMMAS[3])
    gamma = torch.where(label < 0, GAMMAS[1], gamma)
    positive = label > 0
    p_m = (torch.sigmoid(z) - MARGIN).clamp(min=0)
    entropy = torch.where(positive, F.softplus(-z), -torch.log1p(-p_m))
    with torch.no_grad():
        weight = torch.where(positive, torch.sigmoid(-z), p_m**gamma)
    return torch.where(ignored & (label == 0), 0.0, weight * entropy).sum()


def ours(
    data: Data, ignored: Draw | Tensor, logits: Tensor | None = None, *, in_place: bool = False
) -> Tensor:
    """The fused operator's loss of the batch."""
    return selective_loss(
        data.logits if logits is None else logits,
        label=data.label,
        object_id=data.object_id,
        feasible=data.table,
        ignored=ignored,
        loss=LOSS,
        in_place=in_place,
    ).per_row.sum()


def ways(data: Data, *, paper: bool) -> dict[str, Way]:
    """What is measured, by name; the paper's draw takes a minute at the largest shapes."""

    def drawn(z: Tensor, label: Tensor, feasible: Tensor, weight: Tensor) -> Tensor:
        return lean_loss(z, label, feasible, races(weight))

    torch._dynamo.reset()
    compiled_draw, compiled_loss = torch.compile(drawn), torch.compile(lean_loss)

    def backward(loss: Callable[[], Tensor]) -> Way:
        def run() -> None:
            data.logits.grad = None
            loss().backward()  # type: ignore[no-untyped-call]

        return run

    z, label, feasible, weight = data.logits, data.label, data.feasible, data.weight
    found = {
        "paper": backward(lambda: authors_loss(z, label, feasible, choices(data))),
        "psl": backward(lambda: authors_loss(z, label, feasible, data.mask)),
        "eager": backward(lambda: lean_loss(z, label, feasible, races(weight))),
        "compile_draw": backward(lambda: compiled_draw(z, label, feasible, weight)),
        "compile_loss": backward(lambda: compiled_loss(z, label, feasible, data.mask)),
        "ours": backward(lambda: ours(data, data.draw)),
        "ours_loss": backward(lambda: ours(data, data.drawn)),
    }
    if not paper:
        del found["paper"]
    return found
