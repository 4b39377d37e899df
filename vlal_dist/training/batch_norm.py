"""BatchNorm's running statistics across ranks and dummy rows (design 8).

Every rank normalises by its own micro-batch; only the running statistics that evaluation uses are
made equal, after every step, so that a save or an evaluation at any step changes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlal_dist.training.ranks import Ranks


def running_statistics(model: nn.Module) -> list[Tensor]:
    """running_mean and running_var of every BatchNorm layer, in the model's order.

    `num_batches_tracked` is left out: with a fixed momentum nothing reads it, and as each rank runs
    equally many micro-batches it is equal everywhere anyway.
    """
    return [
        buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    ]


def average_statistics(statistics: list[Tensor], ranks: Ranks) -> None:
    """Replace each statistic by its mean over ranks; one flat all-reduce, nothing for one rank."""
    if ranks.world_size == 1 or not statistics:
        return
    flat = ranks.sum(torch.cat([tensor.flatten() for tensor in statistics])) / ranks.world_size
    means = torch.split(flat, [tensor.numel() for tensor in statistics])
    for tensor, mean in zip(statistics, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


@contextmanager
def restored_statistics(statistics: list[Tensor]) -> Iterator[None]:
    """Undo what a forward pass inside does to the statistics; for dummy rows.

    The backward pass belongs inside too: autograd refuses buffers that changed before it.
    """
    before = [tensor.clone() for tensor in statistics]
    yield
    for tensor, old in zip(statistics, before, strict=True):
        tensor.copy_(old)
