"""`vlal run`: the stages of a configuration in order, each unless its last result still holds.

Every stage is a command of its own, printed before it runs: `vlal run` adds nothing to what the
commands do one by one, and imports no torch.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from vlal_dist.config.load import without_flags
from vlal_dist.config.sections import Config, evaluation_folder
from vlal_dist.errors import ConfigError, DataError, Stopped, UsageError, VlalError
from vlal_dist.pipeline import (
    REPLACE,
    RETRY,
    RETRYING,
    STAGES,
    Stage,
    decide,
    plan,
    plan_table,
    read_json,
    stage_remarks,
    stages_of,
)
from vlal_dist.processes import run_child
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.ray_tasks import wants_ray
from vlal_dist.storage.checks import masked
from vlal_dist.storage.lock import descriptors

PURPOSE = """
Run clean, pack, score, merge, train, evaluate (validation split, evaluation.split, constant
baseline), report and export, and print the result table. A stage is skipped while its output is
there and the settings and files that decide it are those that its result recorded; score and merge
where the configuration needs no likelihoods. Repeat the command after any interruption. Takes every
setting of these commands; vlal STAGE --help lists them.
"""
OWN_FLAGS = ("from", "to", "plan", "ranks", "retry-rejected", "engine", "replace", "json")
RESTART = ("--resume", "none")
"""Flag of a training that starts over."""
MARGIN_S = 10.0
"""Seconds beyond `supervise.grace_s` after which a stage that was asked to stop is killed: the
launcher of the ranks gives them that time itself."""


def work(words: Sequence[str], config: Config, flags: Mapping[str, str]) -> Counts:
    """Run what is not up to date; returns the closing counts.

    Args:
        words: command line of every stage.
        config, flags: of this command.

    Raises:
        ConfigError: training would continue a run that other settings began.
        Stopped: a stage stopped by itself, and can be resumed.
        VlalError: a stage failed; with its exit code.
    """
    wants_ray(flags)  # another word fails before any stage
    stages = stages_of(config, retry_rejected="retry-rejected" in flags, replace="replace" in flags)
    stages = select(stages, first=flags.get("from"), last=flags.get("to"))
    if "plan" in flags:
        decisions = plan(stages)
        say(plan_table(stages, decisions))
        return {"stages": len(stages), "finished": [d.action for d in decisions].count("skip")}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    ran = 0
    for stage in stages:
        decision = decide(stage)
        if decision.action == "skip":
            say(f"{stage.title}: finished")
            continue
        command = [stage.command, *words]
        if stage.command in ("pack", "merge") and "engine" in flags:
            command += ["--engine", flags["engine"]]
        if stage.command == "train":
            command += [*_ranks(flags), *(RESTART if decision.action == "redo" else ())]
        else:
            command += stage.words
        if decision.action == "stop":
            raise ConfigError(_stopped(stage, decision.why, command))
        say(f"\n=== {stage.title}: {decision.why}\n$ {masked(shlex.join(['vlal', *command]))}")
        started = time.monotonic()
        code = run_child(
            [sys.executable, "-m", "vlal_dist", *command],
            grace_s=config.supervise.grace_s + MARGIN_S,
            inherited=descriptors(),
        )
        if code != 0:
            say_remarks(stages)
            raise _failure(stage, decision.why, code)
        say(f"{stage.title}: {time.monotonic() - started:.1f} s")
        ran += 1
    if lines := closing(config, {stage.command for stage in stages}):
        say("\n".join(["", *lines]))
    say_remarks(stages)
    return {"stages": len(stages), "run": ran}


def select(stages: Sequence[Stage], *, first: str | None, last: str | None) -> list[Stage]:
    """The stages from `first` to `last`, both included; None: from the first, to the last.

    Raises:
        UsageError: no such stage, or none between them.
    """
    commands = [stage.command for stage in stages]
    for flag, name in (("--from", first), ("--to", last)):
        if name is not None and name not in commands:
            known = ", ".join(dict.fromkeys(commands))
            why = "is not needed by this configuration" if name in STAGES else "is no stage"
            raise UsageError(f"{flag} {name} {why}; its stages: {known}")
    begin = commands.index(first) if first else 0
    end = len(commands) - commands[::-1].index(last) if last else len(commands)
    if begin >= end:
        raise UsageError(f"--from {first} comes after --to {last}; exchange them")
    return list(stages[begin:end])


def gpu_count() -> int:
    """GPUs that training may use, without torch; 0: the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def closing(config: Config, commands: Collection[str]) -> list[str]:
    """What these stages found: CLIP's AUC, the result table, places of page and exported model."""
    paths, split = config.paths, config.evaluation.split
    lines = []
    quality = read_json(paths.scores, "score_clip.result.json").get("counts", {}).get("quality", {})
    if "score" in commands and (auc := quality.get("auc")) is not None:
        splits = ", ".join(config.scoring.splits)
        lines += [f"CLIP's AUC on the annotated pairs ({splits}): {auc:.3f} (chance: 0.5)", ""]
    constant, model = (
        read_json(paths.run, f"{evaluation_folder(split, name)}/result.json")
        for name in ("constant", "model")
    )
    if "evaluate" in commands and constant and model:
        lines += [*result_table(constant, model), ""]
    places = (("report", f"page: {paths.run}/report.html"), ("export", f"model: {paths.export}"))
    return lines + [line for command, line in places if command in commands]


def result_table(constant: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """mAP of the groups of attributes, and on complete labels where both results have them."""
    title = f"{model['split']} split"
    lines = [f"{title:<22}{'attributes':>12}{'constant':>12}{'trained':>12}   mAP, %"]
    groups = list(zip(constant["groups"], model["groups"], strict=True))
    if constant["truth"] and model["truth"]:
        complete = {**constant["truth"]["groups"][0], "name": "complete labels"}
        groups.append((complete, model["truth"]["groups"][0]))
    for one, other in groups:
        values = [group["mAP"] for group in (one, other)]
        shown = "".join(f"{'-':>12}" if v is None else f"{100 * v:>12.1f}" for v in values)
        lines.append(f"{one['name']!s:<22}{other['num_classes']!s:>12}{shown}")
    return lines


def say(text: str) -> None:
    """Print at once, before the output of the next stage."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_remarks(stages: Sequence[Stage]) -> None:
    """Print the remarks of these stages once more: of those that were skipped, too."""
    for title, texts in stage_remarks(stages):
        say("\n".join(f"{title}: warning: {text}" for text in texts))


def _ranks(flags: Mapping[str, str]) -> list[str]:
    """`--ranks` for train: as given, else one per GPU where there are several."""
    if "ranks" in flags:
        return ["--ranks", flags["ranks"]]
    count = gpu_count()
    return ["--ranks", str(count)] if count > 1 else []


def _stopped(stage: Stage, why: str, command: Sequence[str]) -> str:
    again = shlex.join(["vlal", *command, *RESTART])
    return (
        f"train: {stage.config.paths.run} holds a run of other settings ({why}), and is kept; give "
        "other --paths.run and --paths.export FOLDERS, or train again in its place with "
        f"{REPLACE}, or with: {again}"
    )


def _failure(stage: Stage, why: str, code: int) -> VlalError:
    if code == Stopped.exit_code:
        return Stopped(f"{stage.title} was stopped; repeat the same command to continue")
    remedy = "correct the cause and repeat the same command: what has finished is kept"
    if code == DataError.exit_code and why.startswith("changed"):
        remedy = (
            f"{stage.record[0]} was written before this ({why}), and finished data is never "
            f"edited: repeat with {REPLACE} to write it again, give another --paths.root FOLDER, "
            "or undo the change"
        )
        if stage.command in RETRYING and RETRY not in stage.words:
            remedy += f"; where pack {RETRY} changed the dataset, repeat with {RETRY}"
    error = VlalError(f"{stage.title} ended with code {code}, see above; {remedy}")
    error.exit_code = code
    return error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, and return the exit code.

    Args:
        argv: command line without the program's name; absent: this process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    program = Program(
        name="run",
        usage="vlal run",
        purpose=PURPOSE,
        sections=("paths",),
        flags=OWN_FLAGS,
        output=lambda config, flags: config.paths.run,
        writes=lambda config, flags: ((config.paths.run, "run"),),
        work=partial(work, without_flags(argv, OWN_FLAGS)),
    )
    return run_program(program, argv)


if __name__ == "__main__":
    sys.exit(main())
