"""`vlal train [--ranks N]`: train f_a(x, o) with the selective loss, or a row of Table 1.

Also starts as `deepspeed vlal_dist/train.py`, or under torchrun. torch and DeepSpeed are imported
when the work begins, so that `--help` and usage errors are instant.
"""

import sys
from pathlib import Path

# Started by path, Python puts this file's folder first, where `evaluate`, `data` or `kernels` would
# shadow other packages; the repository root belongs there.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import logging
import os
from collections.abc import Mapping, Sequence

from vlal_dist.config.load import config_yaml, parse_command_line, without_flags
from vlal_dist.config.sections import Config
from vlal_dist.errors import UsageError, VlalError, require_modules
from vlal_dist.pipeline import shared_settings, train_inputs
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.remarks import remark

logger = logging.getLogger(__name__)

PURPOSE = """
Train on a merged dataset (paths.merged), or on a packed one with score files (data.likelihood
scores), validate after every epoch, and write checkpoints, metrics.jsonl and the best model to
paths.run. Repeating the command resumes from the newest complete checkpoint, on any number of
ranks. --ranks N starts N of them on this machine, and on SIGTERM or Ctrl-C makes them save together
and leave; for several machines, start the ranks with deepspeed or torchrun.
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
        shared=shared_settings(config),
    )
    trainer = Trainer(run, resume=flags.get("resume", "auto"), launcher=launcher)
    trainer.train()
    state = trainer.state
    if left_out := state.quarantined:
        remark(
            logger,
            "data.damage",
            "%d damaged samples were left out (data.damage quarantine), the first: uid %s: %s; "
            "run vlal verify, and restore the shards",
            len(left_out),
            *next(iter(left_out.items())),
        )
    return {
        "epochs": state.epoch,
        "steps": state.step,
        "ranks": trainer.ranks.world_size,
        "best_mAP": _best(state.best_map, state.best_step),
        "best_step": "none" if state.best_step is None else state.best_step,
        "model": f"{config.paths.run}/best",
    }


def _best(best_map: float | None, best_step: int | None) -> float | str:
    """The best mAP as the closing line shows it."""
    if best_map is not None:
        return best_map
    return "none" if best_step is None else "undefined (the latest model is kept)"


PROGRAM = Program(
    name="train",
    usage="vlal train",
    purpose=PURPOSE,
    sections=(
        "paths", "data", "method", "model", "training", "scoring.temperature", "evaluation",
        "observability",
    ),
    flags=("ranks", "resume", "json"),
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
    asked = {word.partition("=")[0] for word in argv}
    if "--ranks" in asked and not asked & {"--help", "-h"}:
        try:
            argv = _start_ranks(argv)
        except VlalError as error:
            sys.stderr.write(f"train: error: {error}\n")
            return error.exit_code
    code = run_program(PROGRAM, argv, quiet=(os.environ.get("RANK") or "0") != "0")
    # Here no frame of the run holds the engine any more; see leave_ranks.
    if engine := sys.modules.get("vlal_dist.training.engine"):
        engine.leave_ranks()
    return code


def _start_ranks(argv: Sequence[str]) -> list[str]:
    """Become a supervisor of `--ranks N` ranks under torchrun; for one, return its command line.

    Raises:
        UsageError: N is no positive number, or a launcher has already started ranks.
        ConfigError: wrong settings, or no DeepSpeed; said here once instead of on each rank.
    """
    line = parse_command_line(argv, flags=PROGRAM.flags, sections=PROGRAM.sections)
    count = line.flags["ranks"]
    if not (count.isdecimal() and int(count)):
        raise UsageError(f"--ranks must be a number from 1, got {count!r}")
    if found := [name for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)]:
        raise UsageError(
            f"--ranks {count} starts ranks, but this process is one already ({min(found)} is set "
            "by a launcher): leave out --ranks, or start without the launcher"
        )
    require_modules("deepspeed")
    rest = without_flags(argv, ("ranks",))
    if int(count) == 1:
        return rest
    python = (sys.executable, "-m")
    grace_s = str(line.config.supervise.grace_s)
    own = ("--config", "vaw", "--supervise.restarts", "0", "--supervise.grace_s", grace_s)
    launcher = (*python, "vlal_dist.training.launch", "--standalone", "--nproc_per_node", count)
    sys.stdout.flush()
    os.execv(
        sys.executable,
        [*python, "vlal_dist.supervise", *own, "--", *launcher, "-m", "vlal_dist.train", *rest],
    )


if __name__ == "__main__":
    sys.exit(main())
