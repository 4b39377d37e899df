"""One rank of test_zero.py: trains, saves Adam's complete state, continues from a saved one.

    python -m tests.training.zero_worker FOLDER ROUND...     ROUND: FROM:STAGE:NAME

Each round builds an engine of a ZeRO stage, restores FROM (empty: nothing), makes STEPS steps and
saves the state as NAME. Rank 0 writes; the others check that theirs is the same.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.fixtures import tiny_model
from vlal_dist.config.sections import TrainingConfig
from vlal_dist.training.engine import Engine, leave_ranks
from vlal_dist.training.ranks import Ranks, join_ranks

STEPS, ROWS = 2, 6


def rows(step: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a step's batch, which does not depend on the number of ranks."""
    own = torch.arange(ranks.rank, ROWS, ranks.world_size)
    image = torch.linspace(0, 1 + step, ROWS * 3 * 8 * 8).reshape(ROWS, 3, 8, 8).cos()
    return image[own], (own + step) % tiny_model.OBJECTS


def round_of(start: str, stage: int, name: str, *, ranks: Ranks, folder: Path) -> None:
    model = tiny_model.SmallClassifier()
    engine = Engine(
        model,
        tiny_model.groups(model),
        ranks,
        TrainingConfig(batch_size=ROWS, zero_stage=stage, precision="fp32"),
        micro_batches=1,
    )
    first = 0
    if start:
        kept = load_file(folder / f"{start}.safetensors")
        with torch.no_grad():
            model.load_state_dict({k[2:]: v for k, v in kept.items() if k.startswith("m:")})
        adam = {k[2:]: v for k, v in kept.items() if k.startswith("a:")}
        engine.restore_optimizer(adam, where="here")
        again = engine.optimizer_tensors(keep=True)
        assert adam.keys() == again.keys()
        assert all(torch.equal(adam[key], again[key]) for key in adam), "restored is what was kept"
        first = int(kept["first"])
    else:
        assert engine.optimizer_tensors(keep=True) == {}
        engine.restore_optimizer({}, where="here")
    engine.module.eval()
    for step in range(first, first + STEPS):
        engine.backward(engine(*rows(step, ranks)).square().sum(), last=True)
        engine.reduce()
        assert engine.gradients() and all(bool(one.isfinite().all()) for one in engine.gradients())
        engine.step()
    adam = engine.optimizer_tensors(keep=ranks.rank == 0)
    if ranks.rank == 0:
        found = {f"m:{key}": value for key, value in model.state_dict().items()}
        found |= {f"a:{key}": value for key, value in adam.items()}
        save_file({**found, "first": torch.tensor(first + STEPS)}, folder / f"{name}.safetensors")
    else:
        assert adam == {} or stage == 0
    ranks.agree(False)  # until rank 0 has written


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = join_ranks(threads=1, timeout_s=120, stopped=lambda: False)
    for one in sys.argv[2:]:
        start, stage, name = one.split(":")
        round_of(start, int(stage), name, ranks=ranks, folder=folder)


if __name__ == "__main__":
    main()
    leave_ranks()
