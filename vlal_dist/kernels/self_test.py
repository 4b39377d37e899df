"""Self-test: the backend of a device against the reference on a made-up batch."""

from typing import NamedTuple, get_args

import torch

from vlal_dist.config.sections import LossConfig
from vlal_dist.kernels.arguments import Draw, FeasibleTable
from vlal_dist.kernels.operator import Kernel, selective_loss

ROWS, ATTRIBUTES, OBJECTS = 64, 591, 5
LIMIT = 1e-5
"""Relative error in float32 that every backend may have."""


class Difference(NamedTuple):
    """How far a backend is from the reference.

    Attributes:
        same_draw: whether the same attributes are ignored.
        loss, gradient: greatest relative difference of a row's loss; norm of the gradients'
            difference relative to that of the gradient.
    """

    same_draw: bool
    loss: float
    gradient: float

    @property
    def good(self) -> bool:
        """Whether the backend may be used."""
        return self.same_draw and self.loss <= LIMIT and self.gradient <= LIMIT


def self_test(device: torch.device) -> Difference:
    """Compare the backend that `choose` takes with the reference, on the device.

    Raises:
        ConfigError: the forced backend does not work here.
    """
    generator = torch.Generator().manual_seed(0)
    member = torch.rand(OBJECTS, ATTRIBUTES, generator=generator) < 0.3
    object_id = torch.randint(OBJECTS, (ROWS,), generator=generator)
    sizes = member.sum(1)
    lengths = sizes[object_id]
    label = torch.randint(-1, 2, (ROWS, ATTRIBUTES), generator=generator).to(torch.int8)
    label[torch.rand(ROWS, ATTRIBUTES, generator=generator) > 0.01] = 0
    logits = 3 * torch.randn(ROWS, ATTRIBUTES, generator=generator) - 2
    weight = torch.rand(int(lengths.sum()), generator=generator).mul(12).exp()
    zero = torch.zeros(1, dtype=torch.int64)
    sets = FeasibleTable(
        torch.cat([zero, sizes.cumsum(0)]), member.nonzero()[:, 1].to(torch.int32), int(sizes.max())
    )
    draw = Draw(
        weight_indptr=torch.cat([zero, lengths.cumsum(0)]),
        inverse_weight=weight,
        uid=torch.arange(ROWS),
        visit=torch.zeros(ROWS, dtype=torch.int64),
        seed=torch.tensor([7]),
    )
    found = []
    for kernel in get_args(Kernel):
        leaf = logits.to(device).requires_grad_()
        terms = selective_loss(
            leaf,
            label=label.to(device),
            object_id=object_id.to(device),
            feasible=FeasibleTable(sets.indptr.to(device), sets.indices.to(device), sets.largest),
            ignored=Draw(*(t.to(device) for t in draw)),
            loss=LossConfig(),
            kernel=kernel,
        )
        (gradient,) = torch.autograd.grad(terms.per_row.sum(), leaf)
        found.append((terms.per_row.detach(), gradient))
    (loss, gradient), (exact_loss, exact) = found
    return Difference(
        torch.equal(gradient == 0, exact == 0),
        float(((loss - exact_loss) / exact_loss).abs().max()),
        float((gradient - exact).norm() / exact.norm()),
    )
