"""From the figures of benchmarks/loader/loader.py's runs to its ratios, its table and its files."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

PEERS = {"webdataset": "webdataset", "litdata": "litdata", "streaming": "mosaicml"}
"""Peer -> its name in the ratios."""


@dataclass(frozen=True)
class Figures:
    """What one run gave: samples per second, and per CPU second; cores that the S3 server used."""

    per_s: float
    per_cpu_s: float
    server_cores: float = 0.0


def summarise(results: dict[str, list[Figures]]) -> dict[str, float | None]:
    """Flat numbers: medians over rounds of ratios within a round, and of rates."""
    numbers: dict[str, float | None] = {}
    for photos in ("", "_photos"):
        for one in ("", "_one_process"):
            ours = results.get(f"ours{photos}{one}")
            if not ours:
                continue
            others = {"ceiling": ("ceiling", "")}
            others |= {named: (peer, "") for peer, named in PEERS.items()}
            others |= {f"{n}_as_shipped": (p, "_as_shipped") for p, n in PEERS.items()}
            for named, (peer, variant) in others.items():
                if variant and one:
                    continue
                theirs = results.get(f"{peer}{variant}{photos}{one}")
                numbers[f"ratio_to_{named}{photos}{one}"] = _ratio(ours, theirs)
        s3, local = results.get(f"ours_s3{photos}"), results.get(f"ours{photos}")
        if s3 and local:
            numbers[f"ratio_s3_to_local{photos}"] = statistics.median(
                _without_server(a) / b.per_s for a, b in zip(s3, local, strict=True)
            )
            numbers[f"ratio_s3_to_local_raw{photos}"] = _ratio(s3, local)
    for label, found in results.items():
        numbers[f"samples_per_s_{label}"] = statistics.median(f.per_s for f in found)
        numbers[f"samples_per_cpu_s_{label}"] = statistics.median(f.per_cpu_s for f in found)
    return numbers


def _ratio(ours: list[Figures], theirs: list[Figures] | None) -> float | None:
    if theirs is None:
        return None
    return statistics.median(a.per_s / b.per_s for a, b in zip(ours, theirs, strict=True))


def _without_server(found: Figures) -> float:
    """Samples per second if the two cores had been the loader's alone."""
    return found.per_s * 2 / (2 - found.server_cores)


def table(results: dict[str, list[Figures]], numbers: dict[str, float | None]) -> str:
    """Markdown: rates with their spread over rounds, then ratios."""
    lines = ["| what | samples/s, median (least - most) | per CPU second | server's cores |"]
    lines.append("|---|---|---|---|")
    for label, found in results.items():
        rates = sorted(f.per_s for f in found)
        cpu = statistics.median(f.per_cpu_s for f in found)
        server = statistics.median(f.server_cores for f in found)
        lines.append(
            f"| {label} | {statistics.median(rates):,.0f} ({rates[0]:,.0f} - {rates[-1]:,.0f}) "
            f"| {cpu:,.0f} | {f'{server:.2f} of 2' if server else ''} |"
        )
    lines += ["", "| ratio | median over rounds |", "|---|---|"]
    for name, value in numbers.items():
        if name.startswith("ratio"):
            lines.append(f"| {name} | {'null' if value is None else f'{value:.2f}'} |")
    return "\n".join(lines) + "\n"


def write(
    results: dict[str, list[Figures]], *, json_path: Path | None, markdown_path: Path | None
) -> str:
    """The results so far, in the files that are wanted and as text."""
    numbers = summarise(results)
    text = table(results, numbers)
    if markdown_path:
        markdown_path.write_text(text)
    if json_path:
        json_path.write_text(json.dumps(numbers, indent=2) + "\n")
    return text
