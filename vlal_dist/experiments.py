"""`python -m vlal_dist.experiments table1|table2|ablations`: the paper's claims with error bars.

Trains what is missing, run by run, each as a process of its own, and writes the table after each.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlal_dist.config.load import config_yaml, load_config
from vlal_dist.config.sections import Config
from vlal_dist.errors import ConfigError, UsageError
from vlal_dist.experimenting.grid import (
    Base,
    Variant,
    ablation_rows,
    table1_rows,
    table2_rows,
)
from vlal_dist.experimenting.jobs import (
    TEST,
    Job,
    check_same,
    cuda_devices,
    flat_settings,
    is_done,
    places,
    read_json,
    state_of,
    stored_temperature,
)
from vlal_dist.experimenting.queue import Outcome, RunsFailedError, run_queue
from vlal_dist.experimenting.results import Replicates, collect
from vlal_dist.experimenting.summary import summarise
from vlal_dist.experimenting.tables import Table, write_table
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.storage.store import open_store

TABLES = {
    "table1": "six losses on the same data (Table 1)",
    "table2": "NUM_IGNORE from nothing to all (Table 2)",
    "ablations": "one change at a time from the configuration",
}
"""Verb -> what it shows."""

PURPOSE = """
Train and evaluate every row of a table for every seed of experiments.seeds, and write the table to
paths.experiments, after each run. A repeated command continues; with nothing left to train it only
writes the table. Rows that stand in several tables are trained once. --plan lists the runs.
"""
SECTIONS = (
    "paths", "experiments", "data", "method", "model", "training", "evaluation", "observability",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What a command asks for: the rows of its table, and their runs, seed by seed."""

    rows: list[Variant]
    jobs: list[Job]


def run_table(table: str, config: Config, flags: Mapping[str, str]) -> Counts:
    """Train what is missing, write the table; returns the closing counts."""
    root = _root(config)
    asked = _asked(table, config, root)
    missing = [job for job in asked.jobs if not is_done(job)]
    if "plan" in flags:
        for job in asked.jobs:
            _say(f"{state_of(job):<7} {job.root}")
        return {"runs": len(asked.jobs), "done": len(asked.jobs) - len(missing)}
    replicates = Replicates(
        config.paths.dataset,
        cache=Path(config.paths.cache),
        count=config.experiments.replicates,
    )
    page = _write(table, asked, config, replicates, root)

    def ended(outcome: Outcome) -> None:
        _tell_end(outcome)
        _write(table, asked, config, replicates, root)

    failures: list[Outcome] = []
    if missing:
        where = places(
            config.experiments.jobs,
            ranks=config.experiments.ranks,
            devices=cuda_devices(config.experiments.ranks),
            cores=len(os.sched_getaffinity(0)),
        )
        _say(f"{table}: {len(missing)} of {len(asked.jobs)} runs to do in {root}")
        failures = run_queue(missing, where, root=root, started=_tell_start, ended=ended)
    _say(page.with_suffix(".md").read_text(encoding="utf-8"))
    if failures:
        names = ", ".join(f"{outcome.job.title} (code {outcome.code})" for outcome in failures)
        raise RunsFailedError(
            f"{len(failures)} of {len(asked.jobs)} runs failed: {names}; see log.txt of each, "
            "mend the cause, and repeat the command",
            failures[0].code,
        )
    return {"runs": len(asked.jobs), "trained": len(missing), "page": str(page)}


def _write(table: str, asked: Asked, config: Config, replicates: Replicates, root: Path) -> Path:
    """The table as far as its runs go."""
    found = {(job.variant, job.seed): collect(job, replicates) for job in asked.jobs}
    runs = {key: run for key, run in found.items() if run is not None}
    failed = {(job.variant, job.seed) for job in asked.jobs if state_of(job) == "failed"}
    seeds = list(dict.fromkeys(config.experiments.seeds))
    rows = summarise(asked.rows, runs, seeds=seeds, failed=frozenset(failed))
    name, count = replicates.dataset.name, config.experiments.replicates
    return write_table(Table(table, name, seeds, count, rows, runs), root)


def _asked(table: str, config: Config, root: Path) -> Asked:
    rows = _rows(table, config)
    with _resolver(config) as resolve:
        jobs = [
            _job(row, seed, config, root, resolve)
            for seed in dict.fromkeys(config.experiments.seeds)
            for row in rows
        ]
    return Asked(rows, jobs)


def _rows(table: str, config: Config) -> list[Variant]:
    if table == "table1":
        return table1_rows()
    own = str(config.method.num_ignore)
    if table == "table2":
        return table2_rows(config.experiments.num_ignores, own)
    method = config.method
    return ablation_rows(
        Base(
            num_ignore=own,
            margin=method.margin,
            draw_over=method.draw_over,
            draw=method.draw,
            draw_weights=method.draw_weights,
            detach_focal=method.detach_focal,
            temperature=_temperature(config),
        )
    )


def _temperature(config: Config) -> float:
    """Tau of the likelihoods that training would see."""
    return config.scoring.temperature or stored_temperature(
        dataset_url=next(iter(config.data.mix), config.paths.merged),
        scores_url=config.paths.scores if config.data.likelihood == "scores" else None,
        cache=Path(config.paths.cache),
    )


Resolve = Callable[[Mapping[str, str]], Config]


@contextmanager
def _resolver(config: Config) -> Iterator[Resolve]:
    """The configuration with overrides, checked as those of a command line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.yaml"
        path.write_text(config_yaml(config), encoding="utf-8")
        yield lambda overrides: load_config(str(path), overrides, sections=SECTIONS)


def _job(row: Variant, seed: int, config: Config, root: Path, resolve: Resolve) -> Job:
    """A run as it would be started now; what lies in its folder must be of the same settings."""
    place = root / row.name / f"seed-{seed}"
    overrides = {
        **row.overrides,
        "training.seed": str(seed),
        "paths.run": str(place),
        "observability.metrics": "false",
        "observability.textfiles": "none",  # of this program alone, not of each of its runs
    }
    if not config.training.threads:
        at_once = config.experiments.jobs * config.experiments.ranks
        overrides["training.threads"] = str(max(1, len(os.sched_getaffinity(0)) // at_once))
    prior = None if row.prior is None else root / row.prior / f"seed-{seed}"
    if prior is not None:
        overrides["method.psl_prior"] = str(prior / "evaluation/train-model/attributes.parquet")
    resolved = resolve(overrides)
    recorded = place / "config.yaml"
    if recorded.is_file():
        trained = load_config(str(recorded), {}, sections=())
        check_same(_settings(trained), _settings(resolved), where=str(place))
    return Job(
        variant=row.name,
        seed=seed,
        root=place,
        config_text=config_yaml(resolved),
        prior=prior,
        truth=config.evaluation.truth is not None,
    )


def _settings(config: Config) -> dict[str, object]:
    """What decides a run's result, with the places that its data come from."""
    read = {"merged"} if config.data.likelihood == "tar" else {"dataset", "scores"}
    return flat_settings(
        {
            "method": config.method.model_dump(),
            "training": config.training.model_dump(),
            "data": config.data.model_dump(),
            "model": config.model.model_dump(),
            "scoring": {"temperature": config.scoring.temperature},
            "paths": {
                name: value for name, value in config.paths.model_dump().items() if name in read
            },
        }
    )


def _root(config: Config) -> Path:
    path = open_store(config.paths.experiments).local_path("lock")
    if path is None:
        raise ConfigError(
            f"paths.experiments is {config.paths.experiments}; it must be a local path, where the "
            "queue keeps its lock and logs"
        )
    return Path(config.paths.experiments).expanduser()


def _tell_start(job: Job, waiting: int) -> None:
    _say(f"started  {job.title}; {waiting} waiting")


def _tell_end(outcome: Outcome) -> None:
    job = outcome.job
    if outcome.code:
        for line in outcome.lines:
            _say(f"  | {line}")
        _say(f"FAILED   {job.title}: code {outcome.code}, {job.root / 'log.txt'}")
        return
    result = read_json(job.root / TEST / "result.json") or {}
    groups = result.get("groups")
    overall = groups[0]["mAP"] if isinstance(groups, list) else None
    shown = "none" if overall is None else f"{100 * overall:.2f} %"
    _say(f"finished {job.title}: {outcome.seconds:.0f} s, test mAP {shown}; {outcome.left} left")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _program(table: str, shows: str) -> Program:
    return Program(
        name=table,
        usage=f"python -m vlal_dist.experiments {table}",
        purpose=f"{shows[0].upper()}{shows[1:]}.\n{PURPOSE.rstrip()}",
        sections=SECTIONS,
        flags=("plan", "json"),
        output=lambda config, flags: config.paths.experiments,
        work=lambda config, flags: run_table(table, config, flags),
    )


PROGRAMS = {table: _program(table, shows) for table, shows in TABLES.items()}


def usage_text() -> str:
    """The tables and how to get help on each."""
    lines = [
        "usage: python -m vlal_dist.experiments TABLE [--config FILE] [--section.key value ...]", ""
    ]  # fmt: skip
    lines += [f"  {name:<10} {shows}" for name, shows in TABLES.items()]
    lines += ["", "python -m vlal_dist.experiments TABLE --help lists the settings"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one table's program and return its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given and given[0] in ("--help", "-h"):
        sys.stdout.write(usage_text())
        return 0
    if not given or given[0] not in PROGRAMS:
        what = f"unknown table {given[0]!r}" if given else "no table given"
        known = ", ".join(PROGRAMS)
        sys.stderr.write(f"experiments: error: {what}; known: {known}\n{usage_text()}")
        return UsageError.exit_code
    return run_program(PROGRAMS[given[0]], given[1:])


if __name__ == "__main__":
    sys.exit(main())
