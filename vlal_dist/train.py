"""`deepspeed vlal_dist/train.py`: train f_a(x, o) with the selective loss, or a row of Table 1.

Also starts under torchrun and plain python. torch and DeepSpeed are imported when the work begins,
so that `--help` and usage errors are instant.
"""

import sys
from pathlib import Path

# Started by path, Python puts this file's folder first, where `evaluate`, `data` or `kernels` would
# shadow other packages; the repository root belongs there.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
from collections.abc import Mapping, Sequence

from vlal_dist.config.load import config_yaml
from vlal_dist.config.sections import Config
from vlal_dist.pipeline import train_inputs
from vlal_dist.program import Counts, Program, run_program

PURPOSE = """
Train on a merged dataset (paths.merged), or on a packed one with score files (data.likelihood
scores), validate after every epoch, and write checkpoints, metrics.jsonl and the best model to
paths.run. Repeating the command resumes from the newest complete checkpoint, on any number of
ranks.
"""


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Train; returns the closing counts."""
    from vlal_dist.training.stop import launcher_processes

    launcher = launcher_processes()  # before the slow imports: it may die early
    from vlal_dist.training.trainer import RunConfig, Trainer

    run = RunConfig(
        paths=config.paths,
        data=config.data,
        loss=config.method,
        model=config.model,
        training=config.training,
        scoring=config.scoring,
        evaluation=config.evaluation,
        observability=config.observability,
        text=config_yaml(config),
    )
    trainer = Trainer(run, resume=flags.get("resume", "auto"), launcher=launcher)
    trainer.train()
    state = trainer.state
    return {
        "epochs": state.epoch,
        "steps": state.step,
        "ranks": trainer.ranks.world_size,
        "best_mAP": "none" if state.best_map is None else state.best_map,
        "best_step": "none" if state.best_step is None else state.best_step,
        "model": f"{config.paths.run}/best",
    }


PROGRAM = Program(
    name="train",
    usage="vlal train",
    purpose=PURPOSE,
    sections=(
        "paths", "data", "method", "model", "training", "scoring.temperature", "evaluation",
        "observability",
    ),
    flags=("resume", "json"),
    output=lambda config, flags: config.paths.run,
    work=work,
    inputs=train_inputs,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit code, which is the same on every rank.

    Args:
        argv: command line without the program's name; absent: this process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    code = run_program(PROGRAM, argv, quiet=os.environ.get("RANK", "0") != "0")
    # Here no frame of the run holds the engine any more; see leave_ranks.
    if engine := sys.modules.get("vlal_dist.training.engine"):
        engine.leave_ranks()
    return code


if __name__ == "__main__":
    sys.exit(main())
