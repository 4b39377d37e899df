"""`vlal experiments table1|table2|ablations`: the paper's claims with error bars.

Trains what is missing, each run as processes of its own, and writes the table after each run.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from vlal_dist.config.load import config_yaml, load_config
from vlal_dist.config.sections import Config
from vlal_dist.data.format.dataset import open_dataset
from vlal_dist.errors import ConfigError, VlalError, require_modules
from vlal_dist.experimenting.grid import Variant, ablation_rows, table1_rows, table2_rows
from vlal_dist.experimenting.jobs import (
    TRAIN,
    Job,
    check_config,
    cuda_devices,
    is_done,
    places,
    state_of,
    stored_temperature,
)
from vlal_dist.experimenting.queue import run_queue, say
from vlal_dist.experimenting.results import ResultReader, summarise
from vlal_dist.experimenting.tables import Table, write_table
from vlal_dist.program import Counts, Program, run_one_of, run_program
from vlal_dist.storage.store import open_store

TABLES = {
    "table1": "six losses on the same data (Table 1)",
    "table2": "NUM_IGNORE from nothing to all (Table 2)",
    "ablations": "one change at a time from the configuration",
}
"""Verb -> its purpose."""

PURPOSE = """
Train and evaluate every row of a table for every seed of experiments.seeds, and write the table to
paths.experiments, after each run. A repeated command continues; with nothing left to train it only
writes the table. Rows of several tables are trained once. --plan lists the runs.
"""
SECTIONS = (
    "paths", "experiments", "data", "method", "model", "training", "evaluation", "observability",
)  # fmt: skip


def run_table(table: str, config: Config, flags: Mapping[str, str]) -> Counts:
    """Train what is missing, write the table; returns the closing counts."""
    if open_store(config.paths.experiments).local_path("lock") is None:
        raise ConfigError(
            f"paths.experiments is {config.paths.experiments}; it must be a local path, where the "
            "queue keeps its lock and logs"
        )
    root = Path(config.paths.experiments).expanduser()
    rows = _rows(table, config)
    seeds = list(dict.fromkeys(config.experiments.seeds))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as base:
        base.write(config_yaml(config))
        base.flush()
        jobs = [_job(row, seed, config, root, base.name) for seed in seeds for row in rows]
    missing = [job for job in jobs if not is_done(job)]
    if "plan" in flags:
        for job in jobs:
            say(f"{state_of(job):<7} {job.root}")
        return {"runs": len(jobs), "done": len(jobs) - len(missing)}
    dataset = open_dataset(config.paths.dataset, cache=Path(config.paths.cache))
    count = config.experiments.replicates
    reader = ResultReader(dataset, count=count)

    def write() -> Path:
        """Write the table of the runs that have ended."""
        found = {(job.variant, job.seed): reader.read(job) for job in jobs}
        runs = {key: run for key, run in found.items() if run is not None}
        failed = frozenset((job.variant, job.seed) for job in jobs if state_of(job) == "failed")
        summary = summarise(rows, runs, seeds=seeds, failed=failed)
        return write_table(Table(table, dataset.name, seeds, count, summary, runs), root)

    page = write()
    failures: dict[str, int] = {}
    if missing:
        require_modules("deepspeed")
        cores = len(os.sched_getaffinity(0))
        where = places(config.experiments, devices=cuda_devices(), cores=cores)
        say(f"{table}: {len(missing)} of {len(jobs)} runs to do in {root}")
        failures = run_queue(missing, where, ended=write)
    say(page.with_suffix(".md").read_text(encoding="utf-8"))
    if failures:
        names = ", ".join(f"{title} (code {code})" for title, code in failures.items())
        error = VlalError(
            f"{len(failures)} of {len(jobs)} runs failed: {names}; see log.txt of each, fix the "
            "cause, and repeat the command"
        )
        error.exit_code = next(iter(failures.values()))
        raise error
    return {"runs": len(jobs), "trained": len(missing), "page": str(page)}


def _rows(table: str, config: Config) -> list[Variant]:
    if table == "table1":
        return table1_rows()
    if table == "table2":
        return table2_rows(config.experiments.num_ignores, str(config.method.num_ignore))
    temperature = config.scoring.temperature or stored_temperature(config.data, config.paths)
    return ablation_rows(config.method, temperature)


def _job(row: Variant, seed: int, config: Config, root: Path, base: str) -> Job:
    """A run as it would be started now.

    Raises:
        ConfigError: its folder holds a run that was trained with other settings.
    """
    folder = root / row.name / f"seed-{seed}"
    overrides = {
        **row.overrides,
        "training.seed": str(seed),
        "paths.run": str(folder),
        "observability.metrics": "false",
        "observability.textfiles": "none",  # of this program alone, not of each of its runs
    }
    if not config.training.threads:
        at_once = config.experiments.jobs * config.experiments.ranks
        overrides["training.threads"] = str(max(1, len(os.sched_getaffinity(0)) // at_once))
    prior = None if row.prior is None else root / row.prior / f"seed-{seed}"
    if prior is not None:
        overrides["method.psl_prior"] = str(prior / TRAIN / "attributes.parquet")
    resolved = load_config(base, overrides, sections=SECTIONS)
    recorded = folder / "config.yaml"
    if recorded.is_file():
        trained = load_config(str(recorded), {}, sections=())
        check_config(_decisive(trained), _decisive(resolved), where=str(folder))
    return Job(
        variant=row.name,
        seed=seed,
        root=folder,
        config_text=config_yaml(resolved),
        prior=prior,
        truth=config.evaluation.truth is not None,
    )


def _decisive(config: Config) -> dict[str, dict[str, object]]:
    """Sections that decide a run's result, with the places that its data come from."""
    paths = {"merged"} if config.data.likelihood == "tar" else {"dataset", "scores"}
    sections: dict[str, dict[str, object]] = config.model_dump(
        include={
            "method": True,
            "training": True,
            "data": True,
            "model": True,
            "scoring": {"temperature"},
            "paths": paths,
        }
    )
    return sections


PROGRAMS = {
    table: Program(
        name=table,
        usage=f"vlal experiments {table}",
        purpose=f"{purpose[0].upper()}{purpose[1:]}.\n{PURPOSE.rstrip()}",
        sections=SECTIONS,
        flags=("plan", "json"),
        output=lambda config, flags: config.paths.experiments,
        work=partial(run_table, table),
    )
    for table, purpose in TABLES.items()
}


def main(argv: Sequence[str]) -> int:
    """Run one table's program and return its exit code."""
    return run_one_of(
        TABLES,
        lambda table, rest: run_program(PROGRAMS[table], rest),
        argv,
        command="vlal experiments",
        kind="table",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
