"""From the figures of benchmarks/scoring/score.py's runs to its ratios, its table and its files."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figures:
    """What one run gave: images (or similarities) in the seconds that were measured."""

    count: float
    seconds: float
    wall_seconds: float | None = None

    @property
    def per_s(self) -> float:
        """Images (or similarities) per second."""
        return self.count / self.seconds


Results = Mapping[str, Sequence[Figures]]

RATIOS: dict[str, tuple[str, tuple[str, ...], float | None]] = {
    "actor_to_ceiling": ("actor", ("process",), 0.95),
    "two_actors_to_one": ("two_actors", ("actor",), 1.8),
    "two_actors_to_ceiling": ("two_actors", ("two_processes",), None),
    "two_processes_to_one": ("two_processes", ("process",), None),
    "encoder_share": ("actor", ("encoder",), None),
    "ratio_to_naive": ("actor", ("naive",), 20.0),
    "ratio_to_ray_data": ("two_actors", ("ray_data_actors", "ray_data_tasks"), 1.0),
    "ratio_to_clip_retrieval": ("two_actors", ("clip_retrieval",), None),
    "actor_to_ceiling_small": ("actor_small", ("process_small",), None),
    "two_actors_to_one_small": ("two_actors_small", ("actor_small",), None),
    "two_actors_to_ceiling_small": ("two_actors_small", ("two_processes_small",), None),
    "two_processes_to_one_small": ("two_processes_small", ("process_small",), None),
}
"""Name -> ours, the others (of several the faster in each round), the target if there is one."""

RESCORE, RESCORE_TARGET = "rescore_similarities_per_second", 10e6


def ratios(results: Results, name: str) -> list[float]:
    """One ratio per round, sorted; none where something was not measured."""
    ours, others, _ = RATIOS[name]
    rounds = [results.get(other, ()) for other in others]
    if not results.get(ours) or not all(rounds):
        return []
    return sorted(
        mine.per_s / max(their.per_s for their in theirs)
        for mine, *theirs in zip(results[ours], *rounds, strict=True)
    )


def summarise(results: Results) -> dict[str, float | None]:
    """Flat numbers: medians over rounds of ratios within a round, and of rates."""
    numbers: dict[str, float | None] = {}
    for name in RATIOS:
        found = ratios(results, name)
        numbers[name] = statistics.median(found) if found else None
    for label, runs in results.items():
        if label == "rescore":
            numbers[RESCORE] = statistics.median(run.per_s for run in runs)
            numbers["rescore_similarities_per_wall_second"] = statistics.median(
                run.count / (run.wall_seconds or run.seconds) for run in runs
            )
        elif label == "program":
            numbers["program_images"] = runs[0].count
            numbers["program_wall_s"] = runs[0].seconds
        elif runs:
            numbers[f"images_per_s_{label}"] = statistics.median(run.per_s for run in runs)
        if label == "naive":
            numbers["naive_images"] = sum(run.count for run in runs)
    return numbers


def table(results: Results, numbers: Mapping[str, float | None]) -> str:
    """Markdown: rates with their spread over rounds, then ratios beside their targets."""
    lines = ["| what | per second, median (least - most) | images | seconds |", "|---|---|---|---|"]
    for label, runs in results.items():
        if not runs:
            continue
        digits = 0 if label == "rescore" else 2
        rates = [f"{rate:,.{digits}f}" for rate in spread([run.per_s for run in runs])]
        count = statistics.median(run.count for run in runs)
        seconds = statistics.median(run.seconds for run in runs)
        lines.append(
            f"| {label} | {rates[1]} ({rates[0]} - {rates[2]}) | {count:,.0f} | {seconds:.1f} |"
        )
    lines += ["", "| ratio | median (least - most) of rounds | target |", "|---|---|---|"]
    for name, (_, _, target) in RATIOS.items():
        wanted = "" if target is None else f">= {target:g}"
        found = ratios(results, name)
        if found:
            least, middle, most = spread(found)
            lines.append(f"| {name} | {middle:.3f} ({least:.3f} - {most:.3f}) | {wanted} |")
        else:
            lines.append(f"| {name} | null | {wanted} |")
    rescored = numbers.get(RESCORE)
    if rescored:
        lines.append(f"| {RESCORE} | {rescored / 1e6:.1f} million | >= {RESCORE_TARGET / 1e6:g} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Least, median and most."""
    return min(values), statistics.median(values), max(values)


def write(
    results: Results,
    *,
    absent: str | None,
    json_path: Path | None,
    markdown_path: Path | None,
) -> str:
    """The results so far, in the files that are wanted and as text.

    Args:
        results: label -> one run per round.
        absent: why clip-retrieval was not measured; None: it was.
        json_path, markdown_path: where to write.
    """
    numbers = summarise(results)
    text = table(results, numbers)
    if markdown_path:
        markdown_path.write_text(text)
    if json_path:
        told = {**numbers, **({"clip_retrieval_absent": absent} if absent else {})}
        json_path.write_text(json.dumps(told, indent=2) + "\n")
    return text
