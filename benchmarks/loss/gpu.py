"""All checks of the selective loss on a GPU, by one command: correctness, sanitizers, speed.

    python -m benchmarks.loss.gpu [--markdown docs/benchmarks/selective-loss-gpu.md] [--quick]

The backend's report, every test of `tests/kernels` (with a GPU each test of a backend runs on it),
compute-sanitizer's four tools over the self-test, bytes and issue slots of the main program by
ncu once, and the table of selective_loss.py. Absent tools are named.
"""

import datetime
import os
import shutil
import subprocess
import sys

import torch

from benchmarks.common.harness import ROOT, finish, make_parser, table

REPORT = (sys.executable, "-m", "vlal_dist.kernels")
METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "gpu__time_duration.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
COUNTERS = ("--clock-control", "none", "--metrics", ",".join(METRICS))
SANITIZER, FAIL_WITH_9 = "compute-sanitizer", ("--error-exitcode", "9")
# One batch of 16,384 rows, drawn before and drawn inside: what ncu looks at.
ONCE = """
import torch
from benchmarks.loss.ways import make, ours
for dtype in (torch.float32, torch.bfloat16):
    data = make(16384, 591).to("cuda", dtype)
    with torch.no_grad():
        for ignored in (data.drawn, data.draw):
            ours(data, ignored)
torch.cuda.synchronize()
"""


def run(*command: str) -> tuple[bool, str]:
    """Whether a command succeeds, and its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLAL_KERNEL": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(f"{done.returncode} {' '.join(command)[:100]}", file=sys.stderr, flush=True)
    return done.returncode == 0, done.stdout + ("" if done.returncode == 0 else done.stderr)


def with_tool(name: str, tool: str, *command: str) -> tuple[str, bool, str]:
    """A step that needs a tool of NVIDIA's; it is skipped where the tool is absent."""
    path = shutil.which(tool)
    return (name, False, "not in PATH") if path is None else (name, *run(path, *command))


def main() -> int:
    """Run all, write the page; 1 where something failed, 64 without a GPU."""
    arguments = make_parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 64
    quick = ["--quick"] if arguments.quick else []
    steps = [
        ("report", *run(*REPORT)),
        (
            "tests",
            *run(sys.executable, "-m", "pytest", "tests/kernels", "-q", "-m", "not nightly"),
        ),
        *(
            with_tool(f"{SANITIZER} {name}", SANITIZER, "--tool", name, *FAIL_WITH_9, *REPORT)
            for name in ("memcheck", "racecheck", "initcheck", "synccheck")
        ),
        with_tool(
            "ncu", "ncu", *COUNTERS, "--kernel-name", "vlal_rows", sys.executable, "-c", ONCE
        ),
        ("benchmark", *run(sys.executable, "-m", "benchmarks.loss.selective_loss", *quick)),
    ]
    page = [
        "# The selective loss on a GPU",
        f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}:",
        "    python -m benchmarks.loss.gpu",
        table(["step", "good"], [(name, "yes" if good else "no") for name, good, _ in steps]),
    ]
    for name, _, text in steps:
        shown = text if name == "benchmark" else text[-6000:]
        fence = "" if name == "benchmark" else "```\n"
        page.append(f"## {name}\n\n{fence}{shown.strip()}\n{fence.strip()}")
    finish(arguments, "\n\n".join(page).rstrip() + "\n")
    return 0 if all(good for name, good, said in steps if said != "not in PATH") else 1


if __name__ == "__main__":
    sys.exit(main())
