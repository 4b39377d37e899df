"""A small model and a made-up epoch, the same in every process and in the float64 reference.

Shapes: N rows of the epoch, A attributes, O objects, S image side.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vlal_dist.data.batch import Batch
from vlal_dist.data.loader import Step
from vlal_dist.data.steps import plan_step
from vlal_dist.kernels.inputs import FeasibleTable
from vlal_dist.method.baselines import loss_settings
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.training.objective import Objective, feasible_table

ROWS, ATTRIBUTES, OBJECTS, SIDE, LANES = 24, 7, 3, 8, 8
BATCH = 12
RATE, DECAY = 1e-2, 0.1


class SmallClassifier(nn.Module):
    """Convolution, BatchNorm, an object table, a Linear: each kind of the real one's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.table = nn.Embedding(OBJECTS, 4)
        self.classifier = nn.Linear(4, ATTRIBUTES)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, image: Tensor, object_id: Tensor) -> Tensor:
        pooled = torch.relu(self.bn(self.conv(image))).mean(dim=(2, 3))
        logits: Tensor = self.classifier(pooled * torch.sigmoid(self.table(object_id)))
        return logits


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Decay for matrices, none for vectors, as `parameter_groups`."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"name": "decay", "params": matrices, "lr": RATE, "weight_decay": DECAY},
        {"name": "no_decay", "params": vectors, "lr": RATE, "weight_decay": 0.0},
    ]


def feasible_sets() -> FeasibleSets:
    """Omega_o of each object; one of them is empty."""
    mask = np.random.default_rng(11).random((OBJECTS, ATTRIBUTES)) < 0.7
    mask[1] = False
    owner, attribute = np.nonzero(mask)
    indptr = np.searchsorted(owner, np.arange(OBJECTS + 1))
    count = np.ones(len(owner), np.int32)
    return FeasibleSets(indptr, attribute.astype(np.int32), count, count)


def table() -> FeasibleTable:
    return feasible_table(
        feasible_sets(),
        num_objects=OBJECTS,
        num_attributes=ATTRIBUTES,
        device=torch.device("cpu"),
    )


def objective(loss: str, **changes: Any) -> Objective:
    plain = Objective(
        loss=loss_settings(loss),
        margin=0.05,
        detach_focal=True,
        num_ignore=2,
        draw_over="feasible",
        seed=99,
        kernel="auto",
        batch_size=BATCH,
        reference_batch=6,
        psl_prior=torch.linspace(0.2, 0.6, ATTRIBUTES),
        psl_top_k=1,
    )
    return replace(plain, **changes)


def rows(index: npt.NDArray[np.int64]) -> Batch:
    """The given rows of the epoch."""
    rng = np.random.default_rng(7)
    image = rng.normal(size=(ROWS, 3, SIDE, SIDE)).astype(np.float32)
    label = rng.choice([-1, 0, 0, 0, 1], size=(ROWS, ATTRIBUTES)).astype(np.int8)
    weight = (1 + rng.exponential(size=label.shape)).astype(np.float32)
    weight[rng.random(label.shape) < 0.1] = np.inf  # cannot be drawn
    object_id = rng.integers(OBJECTS, size=ROWS)
    uid = rng.integers(2**63, size=ROWS)
    sets = [feasible_sets().of(int(object_id[row])) for row in index]
    ragged = [weight[row, ids] for row, ids in zip(index, sets, strict=True)]
    return Batch(
        image=torch.from_numpy(image[index]),
        flip=torch.zeros(len(index), dtype=torch.bool),
        object_id=torch.from_numpy(object_id[index]),
        label=torch.from_numpy(label[index]),
        uid=torch.from_numpy(uid[index]),
        visit=torch.zeros(len(index), dtype=torch.int64),
        row=torch.from_numpy(index),
        row_weight=torch.ones(len(index)),
        weight_indptr=torch.tensor([0, *map(len, sets)]).cumsum(0),
        inverse_weight=torch.from_numpy(np.concatenate([weight[0, :0], *ragged])),
    )


def step(*, start: int, samples: int, micro_batches: int, rank: int, world_size: int) -> Step:
    """A rank's part of a step, cut as the loader cuts it."""
    plan = plan_step(
        start=start,
        samples=samples,
        lanes=LANES,
        micro_batches=micro_batches,
        rank=rank,
        world_size=world_size,
    )
    batches = [rows(index) for index in plan.micro_batches]
    return Step(batches, samples, start + samples, plan.micro_batches)


def in_float64(batch: Batch) -> Batch:
    """Floating fields in double precision, except what the draw looks at."""
    doubles = {
        name: value.double()
        for name, value in batch.tensors().items()
        if name != "inverse_weight" and value.is_floating_point()
    }
    return replace(batch, **doubles)
