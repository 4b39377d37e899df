"""What a shard task costs the driver: empty tasks on a Ray of this machine.

    python -m benchmarks.scheduling.empty_tasks [--quick] [--markdown FILE]

Empty tasks run one after another through `run_on_ray`, as `--engine ray` runs shards. The driver's
processor seconds are those of this process; its memory is the growth of the peak resident size.
"""

import resource
import time
from threading import Event

from benchmarks.common.harness import finish, machine, make_parser, table
from vlal_dist.ray_tasks import ray_session, run_on_ray

TASKS = 100_000


def nothing(number: int) -> int:
    """An empty task."""
    return number


def main() -> None:
    """Run, and print the table."""
    given = make_parser(__doc__).parse_args()
    rows, numbers = [], {}
    with ray_session(actors=2, cpus_per_actor=1):
        list(run_on_ray(nothing, range(100), label="warm-up", stop=Event()))
        for count in (1_000, 10_000) if given.quick else (1_000, 10_000, TASKS):
            before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            for expected, found in enumerate(
                run_on_ray(nothing, range(count), label="empty", stop=Event())
            ):
                assert found == expected
            seconds, after = (
                time.perf_counter() - started,
                resource.getrusage(resource.RUSAGE_SELF),
            )
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            grown = (after.ru_maxrss - before.ru_maxrss) / 1024
            numbers[str(count)] = {"s": seconds, "cpu_s": cpu, "mb": grown}
            rows.append(
                [
                    f"{count:,}",
                    f"{seconds:.1f}",
                    f"{1e3 * seconds / count:.2f}",
                    f"{1e3 * cpu / count:.2f}",
                    f"{grown:.0f}",
                ]
            )
    head = ["tasks", "s", "ms a task", "driver CPU ms a task", "memory MB"]
    finish(given, f"{table(head, rows)}\n\n{machine()}\n", numbers)


if __name__ == "__main__":
    main()
