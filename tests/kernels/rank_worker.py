"""One rank of test_ranks.py: its rows of a global batch, and one step of DDP and of FSDP."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.fixtures.loss_batches import FUSED, Case, draw_of, loss_config, make, run
from vlal_dist.kernels.arguments import MODES
from vlal_dist.kernels.operator import selective_loss

ROWS, FEATURES, NUM_IGNORE = 61, 12, 7
SPLITS = ("parts", "turns", "shuffled", "rank 0 has all", "uneven")


def global_case() -> Case:
    case = make(rows=ROWS, attributes=131, annotated=0.2, seed=41)
    return case._replace(row_weight=(torch.arange(ROWS) % 4).float() / 2)


def rows_of(split: str, rank: int, world_size: int) -> Tensor:
    """The rows of the global batch that a rank has, in its order."""
    every = torch.arange(ROWS)
    if split == "shuffled":
        every = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    if split == "turns":
        return every[rank::world_size]
    if split == "rank 0 has all":
        return every[: 0 if rank else ROWS]
    if split == "uneven":
        return every[1:] if rank == 0 else every[:1] if rank == 1 else every[:0]
    return every.tensor_split(world_size)[rank]


def losses_of(case: Case, mode: str) -> dict[str, Tensor]:
    """What is by row, and what adds up."""
    rows = len(case.logits)
    out = torch.full((rows, NUM_IGNORE), -1, dtype=torch.int32)
    extra = {"drawn_out": out} if mode == "draw" else {}
    losses, gradient, sums, counts = run(
        FUSED[0], case, mode, extra=extra, num_ignore=NUM_IGNORE, margin=0.05
    )
    return {"losses": losses, "gradient": gradient, "drawn": out, "sums": sums, "counts": counts}


def small_model() -> nn.Module:
    """A classifier whose weights are the same in every process."""
    model = nn.Linear(FEATURES, 131)
    g = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model


def features() -> Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(7))


def global_loss(model: nn.Module, case: Case, inputs: Tensor) -> Tensor:
    """These rows' part of the mean over the global batch."""
    terms = selective_loss(
        model(inputs),
        label=case.label,
        object_id=case.object_id,
        feasible=case.feasible,
        ignored=draw_of(case),
        loss=loss_config(num_ignore=NUM_IGNORE),
        row_weight=case.row_weight,
    )
    return terms.per_row.sum() / ROWS


def gradients(model: nn.Module, picked: Tensor, world_size: int) -> dict[str, Tensor]:
    """Of the global batch, on each rank: the wrappers average over ranks, so times W."""
    loss = global_loss(model, global_case().rows(picked), features()[picked])
    (loss * world_size).backward()
    found = {}
    for name, parameter in model.named_parameters():
        slope = parameter.grad
        assert slope is not None
        whole = slope.full_tensor() if isinstance(slope, DTensor) else slope
        found[name.removeprefix("module.")] = whole
    return found


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1 + rank % 2)  # not even that need be equal
    found: dict[str, Tensor] = {}
    for split in SPLITS:
        picked = rows_of(split, rank, world_size)
        for mode in MODES:
            part = losses_of(global_case().rows(picked), mode)
            found |= {f"{split}.{mode}.{name}": tensor for name, tensor in part.items()}
        wrapped = {
            "ddp": DistributedDataParallel(small_model()),
            "fsdp": fully_shard(small_model(), mesh=init_device_mesh("cpu", (world_size,))),
        }
        for kind, model in wrapped.items():
            slopes = gradients(model, picked, world_size)
            found |= {f"{split}.{kind}.{name}": slope for name, slope in slopes.items()}
    save_file(found, Path(sys.argv[1]) / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"]
    main()
