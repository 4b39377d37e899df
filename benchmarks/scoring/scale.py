"""What scoring costs the driver per shard, and whether memory stays flat.

    python benchmarks/scoring/scale.py [--quick] [--folder build/score-scale]
        [--markdown FILE] [--json FILE]

* The driver alone: up to 100,000 shards that two real Ray actors answer for at once, each answer as
  large as that of a real small shard; some with as many annotated pairs as a shard of 1,000 crops.
* Planning: 100,000 shards against a local score root that holds none, half, all of their files;
  and the end of a run: results summed up, `scores.json` written.
* The program itself, a tiny model and two actors: memory and open files over ten times the shards.

Every measurement is a process of its own. Leave the folder for the next time, or delete it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LARGE_PAIRS = 40_000
Result = dict[str, float]
Found = dict[str, list[Result]]


@contextmanager
def quiet_environment() -> Iterator[dict[str, str]]:
    """No running Ray, nothing from or into the home, a short folder for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="vlr")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"HOME": folder, "RAY_TMPDIR": folder, "PATH": path, "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        yield environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def spawn(environment: Mapping[str, str], part: str, folder: Path, *values: int) -> Result:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--part", part]
    command += ["--values", *map(str, values)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Result = json.loads(done.stdout.splitlines()[-1])
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in found.items())
    print(f"{part} {' '.join(map(str, values))}: {numbers}", flush=True)
    return found


def measure(part: str, folder: Path, values: list[int]) -> Result:
    """One measurement in this process."""
    if part == "memory":
        from benchmarks.scoring.scale_memory import watch

        return watch(folder, values[0])
    from benchmarks.scoring import scale_data as data
    from benchmarks.scoring import scale_parts as parts

    small, cache = folder / "small", folder / "cache"
    if part == "make":
        root = data.make_many(folder, data.make_small(folder), values[0])
        for count in (0, values[0] // 2, values[0]):
            data.make_scores(folder, root, count)
        return {}
    if part == "drive":
        return parts.drive(small, values[0], pairs=values[1] if len(values) > 1 else None)
    root = folder / f"many-{values[0]}"
    if part == "plan":
        return parts.plan(root, folder / f"{root.name}-scores-{values[1]}", cache)
    assert part == "close"
    return parts.close(root, small, cache, every=values[1])


def measure_all(folder: Path, *, quick: bool) -> Found:
    """All measurements, each in a process of its own."""
    sizes = (1_000, 10_000) if quick else (1_000, 10_000, 100_000)
    most = sizes[-1]
    with quiet_environment() as environment:
        spawn(environment, "make", folder, most)
        drive = [spawn(environment, "drive", folder, size) for size in sizes]
        drive += [spawn(environment, "drive", folder, sizes[-2], LARGE_PAIRS)]
        counts, every = (0, most // 2, most), (0, 100, 10)
        return {
            "drive": drive,
            "plan": [spawn(environment, "plan", folder, most, count) for count in counts],
            "close": [spawn(environment, "close", folder, most, one) for one in every],
            "memory": [
                spawn(environment, "memory", folder, photos)
                for photos in ((90, 900) if quick else (300, 3_000))
            ],
        }


DRIVE = """\
| shards | annotated pairs in each | seconds | µs per shard | driver CPU s | CPU µs per shard \
| driver MB before | driver peak MB | actor peak MB | Ray's own processes MB \
| of it gcs_server |
|---|---|---|---|---|---|---|---|---|---|---|
"""
PLAN = """\
| shards | of them scored | seconds | MB before | peak MB |
|---|---|---|---|---|
"""
CLOSE = """\
| shards | unusable crops | µs to sum up one result | seconds to write scores.json | its kB \
| MB before | peak MB |
|---|---|---|---|---|---|---|
"""
MEMORY = """\
| shards | seconds | process | MB at 25 % | at 50 % | at 100 % | peak MB \
| open files at 25 % | at 50 % | at 100 % | most |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def markdown(found: Found) -> str:
    """The tables."""
    lines = ["The driver, with two actors that answer at once:", "", DRIVE.rstrip()]
    for one in found["drive"]:
        lines.append(
            f"| {one['shards']:,} | {one['pairs']:,} | {one['seconds']:.1f} | {one['us']:.0f} "
            f"| {one['cpu_s']:.1f} | {one['cpu_us']:.0f} | {one['ready_mb']:.0f} "
            f"| {one['peak_mb']:.0f} | {one['actor_peak_mb']:.0f} | {one['ray_mb']:.0f} "
            f"| {one['gcs_mb']:.0f} |"
        )
    lines += ["", "Planning, a local score root:", "", PLAN.rstrip()]
    for one in found["plan"]:
        lines.append(
            f"| {one['pending'] + one['present']:,} | {one['present']:,} | {one['seconds']:.2f} "
            f"| {one['ready_mb']:.0f} | {one['peak_mb']:.0f} |"
        )
    lines += ["", "The end of a run, without Ray:", "", CLOSE.rstrip()]
    shards = found["plan"][0]["pending"] + found["plan"][0]["present"]
    for one in found["close"]:
        lines.append(
            f"| {shards:,} | {one['quarantined']:,} | {one['add_us']:.0f} | {one['seconds']:.2f} "
            f"| {one['bytes'] / 1000:.1f} | {one['ready_mb']:.0f} | {one['peak_mb']:.0f} |"
        )
    lines += ["", "The program, a tiny model, two actors (the larger of the two):", ""]
    lines.append(MEMORY.rstrip())
    for one in found["memory"]:
        for who in ("driver", "actor"):
            mb = " | ".join(f"{one[f'{who}_mb_{share}']:.0f}" for share in ("25%", "50%", "100%"))
            files = " | ".join(
                f"{one[f'{who}_files_{share}']:.0f}" for share in ("25%", "50%", "100%")
            )
            lines.append(
                f"| {one['shards']:,} | {one['seconds']:.0f} | {who} | {mb} "
                f"| {one[f'{who}_peak_mb']:.0f} | {files} | {one[f'{who}_files_peak']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, or, with --part, be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build/score-scale")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--values", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.part:
        print(json.dumps(measure(given.part, folder, given.values)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = measure_all(folder, quick=given.quick)
    text = markdown(found)
    print("\n" + text)
    if given.markdown:
        given.markdown.write_text(text)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
