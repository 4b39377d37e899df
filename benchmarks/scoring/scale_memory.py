"""Memory and open files of a real scoring on Ray, for benchmarks/scoring/scale.py.

The program as a user runs it, two actors, with a tiny model and small photos; /proc is read while
it runs.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVERY_S = 0.2
READY = re.compile(r"an actor is ready, process (\d+)")
SHARES = (0.25, 0.5, 1.0)
Result = dict[str, float]


@dataclass(frozen=True)
class Reading:
    """One process at one moment; `done` is the number of score files there then."""

    done: int
    rss_mb: float
    peak_mb: float
    files: int


def status_mb(pid: int | str, name: str) -> float:
    """A line of /proc/PID/status that gives kB, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(f"process {pid} has ended")


def family(pid: int, *, but: Set[int]) -> Iterator[int]:
    """Living descendants of a process, without those of `but`."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            if child not in but and Path(f"/proc/{child}/fd").exists():
                yield child
            yield from family(child, but=but)


def make_photos(folder: Path, photos: int) -> Path:
    """A packed dataset of three crops a photo, nine a shard; returns its config file."""
    from tests.fixtures.tiny_vaw import run_all, write_small_vaw

    made = folder / f"photos-{photos}"
    config = made / "config.yaml"
    if not (made / "dataset/dataset.json").exists():
        shutil.rmtree(made, ignore_errors=True)
        config = write_small_vaw(made, images={"train": photos})
        text = config.read_text().replace("shard_bytes: 60000", "shard_bytes: 30000")
        config.write_text(text)
        run_all(config, ["clean", "pack"])
    return config


def watch(folder: Path, photos: int) -> Result:
    """Score `photos` photos on two actors and read memory and open files meanwhile."""
    from tests.scoring.conftest import make_tiny_model

    config, model = make_photos(folder, photos), make_tiny_model(folder / "model", seed=7)
    scores, log = config.parent / "scores", config.parent / "log"
    shutil.rmtree(scores, ignore_errors=True)
    command = [sys.executable, "-m", "vlal_dist.score_clip", "--config", str(config)]
    command += [*model.flags(), "--scoring.device", "cpu", "--scoring.actors", "2"]
    command += ["--scoring.batch_size", "8", "--scoring.decode_threads", "1"]
    found: dict[int, list[Reading]] = {}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)
        started = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(EVERY_S)
                actors = [int(pid) for pid in READY.findall(log.read_text())]
                done = len(list(scores.glob("train/*.safetensors")))
                for pid in [process.pid, *actors] if actors else []:
                    with suppress(OSError):
                        found.setdefault(pid, []).append(_read(pid, done))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(log.read_text())
    if len(found) < 2:
        raise SystemExit(f"{log}: the run ended before an actor was seen; give more photos")
    shards = len(list(scores.glob("train/*.safetensors")))
    result: Result = {"shards": shards, "seconds": seconds}
    driver = found.pop(process.pid)
    result |= {f"driver_{name}": value for name, value in _summary(driver, shards).items()}
    both = [_summary(readings, shards) for readings in found.values()]
    result |= {f"actor_{name}": max(one[name] for one in both) for name in both[0]}
    return result


def _read(pid: int, done: int) -> Reading:
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Reading(done, status_mb(pid, "VmRSS"), status_mb(pid, "VmHWM"), files)


def _summary(readings: list[Reading], shards: int) -> Result:
    """Peak, and what there was when a share of the shards was done."""
    result: Result = {"peak_mb": max(one.peak_mb for one in readings)}
    for share in SHARES:
        # The last reading where the run ended before the next one.
        then = next((one for one in readings if one.done >= share * shards), readings[-1])
        result |= {f"mb_{share:.0%}": then.rss_mb, f"files_{share:.0%}": then.files}
    return result | {"files_peak": max(one.files for one in readings)}
