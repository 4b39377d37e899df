"""A made-up batch through the backend of a device, held to the readable reference."""

from typing import Any, NamedTuple

import torch

from vlal_dist.kernels.arguments import Draw, FeasibleTable
from vlal_dist.kernels.selective_loss import draw_ignored, selective_loss

ROWS, ATTRIBUTES, OBJECTS, NUM_IGNORE = 64, 591, 5, 30
LIMIT = 1e-5
"""Relative error in float32 that is no error (the shared contract of all backends)."""


class Found(NamedTuple):
    """How far a backend is from the reference.

    Attributes:
        same_draw: whether the same attributes are drawn.
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


def self_test(device: torch.device) -> Found:
    """Compare the backend that `choose` takes with the reference, on the device.

    Args:
        device: of the batch.

    Raises:
        ConfigError: what is forced does not work here.
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
    moved = [
        tensor.to(device)
        for tensor in (
            *(torch.cat([zero, sizes.cumsum(0)]), member.nonzero()[:, 1].to(torch.int32)),
            *(torch.cat([zero, lengths.cumsum(0)]), weight),
            *(torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64), torch.tensor([7])),
            *(label, object_id, logits),
        )
    ]
    table = FeasibleTable(moved[0], moved[1], int(sizes.max()))
    draw = Draw(moved[2], moved[3], NUM_IGNORE, False, *moved[4:7])
    given: dict[str, Any] = {"label": moved[7], "object_id": moved[8], "feasible": table}
    drawn, losses, slopes = [], [], []
    for kernel in ("auto", "reference"):
        leaf = moved[9].clone().requires_grad_()
        terms = selective_loss(
            leaf,
            ignored=draw,
            gammas=(1.0, 2.0, 4.0, 7.0),
            margin=0.05,
            detach_focal=True,
            kernel=kernel,
            **given,
        )
        slopes.append(torch.autograd.grad(terms.per_row.sum(), leaf)[0])
        losses.append(terms.per_row.detach())
        drawn.append(draw_ignored(draw, attributes=ATTRIBUTES, kernel=kernel, **given))
    (loss, expected), (slope, exact) = losses, slopes
    return Found(
        torch.equal(*drawn),
        float(((loss - expected) / expected).abs().max()),
        float((slope - exact).norm() / exact.norm()),
    )
