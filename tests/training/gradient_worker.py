"""One rank of test_gradients.py: runs cases on a real DeepSpeed engine, writes what came out."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.fixtures import tiny_model
from vlal_dist.config.sections import TrainingConfig
from vlal_dist.errors import DataError
from vlal_dist.training.engine import Engine, leave_ranks
from vlal_dist.training.ranks import Ranks, join_ranks


def run_case(case: dict[str, Any], ranks: Ranks, out: Path) -> None:
    model = tiny_model.SmallClassifier()
    count = -(-case["micro_batches"] // ranks.world_size)
    engine = Engine(
        model,
        tiny_model.groups(model),
        ranks,
        TrainingConfig(batch_size=tiny_model.BATCH, zero_stage=case["zero"], precision="fp32"),
        micro_batches=count,
    )
    train_step = tiny_model.train_step(
        engine,
        ranks,
        tiny_model.loss_config(case["loss"]),
        kernel=case["kernel"],
    )
    engine.module.train(case["batch_norm"] == "train")
    start, found = 0, {}
    for number, samples in enumerate(case["samples"]):
        step = tiny_model.step(
            start=start,
            samples=samples,
            micro_batches=case["micro_batches"],
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        for batch in step.micro_batches:
            if case.get("nan_row") is not None:
                batch.image[batch.row == case["nan_row"]] = float("nan")
        train_step.accumulate(step)
        (diverged,) = ranks.agree(not train_step.is_finite())
        if diverged:
            try:
                train_step.refuse(number)
            except DataError as error:
                (out / f"{case['name']}-{ranks.rank}.txt").write_text(str(error))
            return
        if case["zero"] == 0:
            for name, parameter in engine.module.named_parameters():
                assert parameter.grad is not None
                found[f"gradient{number}.{name}"] = parameter.grad.clone()
        train_step.apply()
        start += samples
    found["times"] = torch.tensor(train_step.take_times(), dtype=torch.float64)
    tally = train_step.take_tally().over_ranks(ranks)
    found.update(loss=tally.loss, pairs=tally.pairs, rows=tally.rows)
    found.update({f"weight.{k}": v.detach().clone() for k, v in model.state_dict().items()})
    save_file(found, out / f"{case['name']}-{ranks.rank}.safetensors")


def main() -> None:
    out = Path(sys.argv[1])
    ranks = join_ranks(threads=1, timeout_s=120, stopped=lambda: False)
    for case in json.loads((out / f"cases-{ranks.world_size}.json").read_text()):
        run_case(case, ranks, out)


if __name__ == "__main__":
    main()
    leave_ranks()
