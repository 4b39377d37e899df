"""`deepspeed vlal_dist/train.py`: train f_a(x, o) with the selective loss, or a row of Table 1.

Starts as well under torchrun and plain python. torch and DeepSpeed are imported when the work
begins: `--help` and a wrong flag answer at once.
"""

import sys
from pathlib import Path

# Started by path, Python puts this file's folder first, where `evaluate`, `data` or `kernels` would
# shadow other packages; the repository root belongs there.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlal_dist.config.load import config_yaml
from vlal_dist.config.sections import Config
from vlal_dist.program import Counts, Program, run_program

if TYPE_CHECKING:
    from vlal_dist.training.settings import RunSettings

logger = logging.getLogger("vlal_dist.train")

PURPOSE = """
Train on a merged dataset (paths.merged), or on a packed one with score files (data.likelihood
scores), validate after every epoch, and write checkpoints, metrics.jsonl and the best model to
paths.run. Repeating the command resumes from the newest whole checkpoint, on any number of ranks.
"""


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Train; returns the closing counts."""
    from vlal_dist.training.stop import Launcher

    launcher = Launcher.of_this_process()  # before anything slow: it may die early
    from vlal_dist.training.trainer import run_training

    state, world_size = run_training(
        _settings(config), resume=flags.get("resume", "auto"), launcher=launcher
    )
    return {
        "epochs": state.epoch,
        "steps": state.step,
        "ranks": world_size,
        "best_mAP": "none" if state.best_map is None else state.best_map,
        "best_step": "none" if state.best_step is None else state.best_step,
        "model": f"{config.paths.run}/best",
    }


def _settings(config: Config) -> "RunSettings":
    """The run's settings in plain values: below this line nothing sees a `Config`."""
    from vlal_dist.training.settings import RunSettings

    method, training, data = config.method, config.training, config.data
    in_tars = data.likelihood == "tar"
    same_name = {
        **data.model_dump(exclude={"likelihood", "threads"}),
        **training.model_dump(exclude={"threads"}),
        **config.model.model_dump(),
        **config.observability.model_dump(exclude={"textfiles"}),
        **method.model_dump(
            include={"profile", "loss", "draw_over", "draw", "draw_weights"}
            | {"margin", "detach_focal", "psl_prior", "psl_threshold", "psl_topk"}
        ),
    }
    return RunSettings(
        **same_name,
        dataset_url=config.paths.merged if in_tars else config.paths.dataset,
        scores_url=None if in_tars else config.paths.scores,
        run_url=config.paths.run,
        cache=Path(config.paths.cache),
        config_text=config_yaml(config),
        decode_threads=data.threads,
        torch_threads=training.threads,
        temperature=config.scoring.temperature,
        num_ignore=None if method.num_ignore == "all" else method.num_ignore,
        gammas=(
            method.gamma_positive,
            method.gamma_negative,
            method.gamma_feasible,
            method.gamma_infeasible,
        ),
        evaluation_batch_size=config.evaluation.batch_size,
        top_k=config.evaluation.top_k,
        threshold=config.evaluation.threshold,
    )


PROGRAM = Program(
    name="train",
    usage="deepspeed vlal_dist/train.py (or python, or torchrun)",
    purpose=PURPOSE,
    sections=("paths", "data", "method", "model", "training", "evaluation", "observability"),
    flags=("resume", "json"),
    output=lambda config, flags: config.paths.run,
    work=work,
)


def main() -> int:
    """Run the program on the command line's arguments; every rank exits with the same code."""
    code = 1
    try:
        code = run_program(PROGRAM, sys.argv[1:], quiet=os.environ.get("RANK", "0") != "0")
    except Exception:
        logger.exception("train: failed")
    # Only here, where no frame of the run holds the engine any more; see leave_ranks.
    if engine := sys.modules.get("vlal_dist.training.engine"):
        engine.leave_ranks()
    return code


if __name__ == "__main__":
    sys.exit(main())
