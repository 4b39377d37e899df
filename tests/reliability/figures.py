"""`python -m tests.reliability.figures FILE`: what was recorded, for docs/reliability.md.

FIGURES=FILE python -m pytest tests/reliability -m "slow or nightly"
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def spread(values: Sequence[float], unit: str = "s") -> str:
    """Median, and the range where there are several."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.1f} {unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


def kills(rows: list[dict[str, Any]]) -> list[str]:
    lost = [steps for row in rows for steps in row["lost"]]
    seconds = [value for row in rows for value in row["seconds_to_first_step"]]
    counts = ", ".join(f"{steps} steps: {lost.count(steps)}" for steps in sorted(set(lost)))
    return [
        f"{len(lost)} kills in {len(rows)} jobs; bit-identical ends: {len(rows)} of {len(rows)}",
        f"steps lost (checkpoints every 2): {counts}",
        f"from the kill to the first step of the next start, restart included: {spread(seconds)}",
    ]


def signals(rows: list[dict[str, Any]]) -> list[str]:
    table = [
        "| to | supervised | times | exit codes | stopped | all gone | saves | each took |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["target"], row["supervised"]].append(row)
    for (target, supervised), group in groups.items():
        codes = ", ".join(f"{r['signal'][3:]} {r['code']}" for r in group)
        cells = [
            target,
            "yes" if supervised else "no",
            str(len(group)),
            codes,
            spread([r["seconds_to_stop"] for r in group]),
            spread([r["seconds_until_all_gone"] for r in group]),
            ", ".join(sorted({str(r["saves"]) for r in group})),
            spread([r["seconds_of_the_save"] for r in group]),
        ]
        table.append(f"| {' | '.join(cells)} |")
    return table


def main() -> None:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row.pop("name")].append(row)
    special = {"kill": kills, "signal": signals}
    for name, rows in found.items():
        print(f"\n## {name}\n")
        if name in special:
            print("\n".join(special[name](rows)))
            continue
        numbers: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            for key, value in row.items():
                if "seconds" in key and isinstance(value, float):
                    numbers[key].append(value)
        print(f"{len(rows)} times; " + "; ".join(f"{k} {spread(v)}" for k, v in numbers.items()))
        for row in rows:
            print("   ", json.dumps(row))


if __name__ == "__main__":
    main()
