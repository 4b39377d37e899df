"""The loss curve by the fused operator beside that by the readable reference, step by step.

    FASHION12K=FOLDER python benchmarks/loss/loss_curve.py [--steps 131] [--markdown FILE]

Trains on real photos (configs/fashion12k.yaml at full width; made if absent) with one seed: by
`training.kernel auto`, by `reference`, by `auto` once more, and by `reference` with its loss times
1 + 2^-23, which changes gradients in their last bits alone. Each run is vlal_dist/train.py in a
process of its own, in which the operator's calls are listened to:

* ignored pairs: which have no gradient when the same call is given logits and gammas of 0, hashed
  with the samples' uids;
* losses by term, as the trainer adds them up;
* the other operator on the very same logits: what differs is then the operators' alone; the curves
  of two runs also hold what training makes of each earlier difference.

fp64 is no precision of the trainer: weights and images are made doubles here; last bits stay small.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CONFIG = "configs/fashion12k.yaml"
FULL = ["--model.width", "64", "--training.lr_new", "1e-3", "--training.threads", "0"]
RUNS = {
    "auto": ["--training.kernel", "auto"],
    "reference": ["--training.kernel", "reference"],
    "again": ["--training.kernel", "auto"],
    "nudged": ["--training.kernel", "reference"],
}
PAIRS = {
    "fused, reference": ("auto", "reference"),
    "reference, reference with other last bits": ("reference", "nudged"),
    "fused, fused again": ("auto", "again"),
}
TERMS = ("positive", "negative", "feasible", "infeasible")
PRECISIONS = ("fp32", "bf16", "fp64")
BOUND, DOUBLE_STEPS = 1e-5, 40

Record = dict[str, Any]


def relative(one: float, other: float) -> float:
    """|one - other| / |other|; 0 where both are 0."""
    return 0.0 if one == other else abs(one - other) / abs(other) if other else float("inf")


def in_double() -> None:
    """Let this process train and validate in float64."""
    from vlal_dist.evaluation import predictors
    from vlal_dist.training import step, trainer

    made, moved, wrapped = trainer.build_model, step.on_device, trainer.Engine

    def as_doubles(batch: Any, device: Any) -> Any:
        found = moved(batch, device)
        return replace(found, image=found.image.double())

    def alone(*given: Any, **named: Any) -> Any:
        engine = wrapped(*given, **named)
        # One process has nothing to reduce, and DeepSpeed reduces no doubles.
        engine._engine.allreduce_gradients = lambda *_, **__: None
        return engine

    torch.Tensor.float = torch.Tensor.double  # by which the model's head asks for float32
    trainer.Engine = alone
    trainer.build_model = lambda *given, **named: made(*given, **named).double()
    step.on_device = predictors.on_device = as_doubles


def listen(file: Path, *, nudge: bool) -> None:
    """Write a line for each call of the operator in this process's training."""
    from vlal_dist.kernels.operator import selective_loss
    from vlal_dist.training import step

    lines = file.open("w", buffering=1)

    def gradient_of(logits: Any, **given: Any) -> tuple[Any, Any]:
        leaf = logits.detach().clone().requires_grad_()
        terms = selective_loss(leaf, **given)
        terms.per_row.sum().backward()
        return terms, leaf.grad

    def drawn(logits: Any, **given: Any) -> Any:
        names = [name for name in given["loss"].options if name != "detach_focal"]
        flat = {**given, "loss": given["loss"].model_copy(update=dict.fromkeys(names, 0.0))}
        return gradient_of(torch.zeros(logits.shape), **flat)[1] == 0

    def heard(logits: Any, **given: Any) -> Any:
        terms = selective_loss(logits, **given)
        other = {**given, "kernel": "reference" if given["kernel"] == "auto" else "auto"}
        mask, uid = drawn(logits, **given), given["ignored"].uid
        (own_terms, own), (beside, theirs) = (gradient_of(logits, **g) for g in (given, other))
        losses = zip(own_terms.per_row.tolist(), beside.per_row.tolist(), strict=True)
        record = {
            "sums": terms.sums.tolist()[:4],
            "counts": terms.counts.tolist(),
            "mask": hashlib.sha256(mask.numpy().tobytes() + uid.numpy().tobytes()).hexdigest(),
            "same_mask": bool(torch.equal(mask, drawn(logits, **other))),
            "same_counts": beside.counts.tolist() == terms.counts.tolist(),
            "same_logits_sums": beside.sums.tolist()[:4],
            "same_logits_row": max(relative(a, b) for a, b in losses),
            "same_logits_gradient": float((own - theirs).abs().max() / theirs.abs().max()),
        }
        lines.write(json.dumps(record) + "\n")
        return terms._replace(per_row=terms.per_row * (1 + 2**-23)) if nudge else terms

    step.selective_loss = heard


def prepare() -> None:
    """The merged dataset, made as users make it; a finished stage answers at once."""
    if (ROOT / "runs/fashion12k/merged/dataset.json").is_file():
        return
    if not os.environ.get("FASHION12K"):
        raise SystemExit("set FASHION12K to the folder that holds train.json and images.zip")
    stages = ("shard_tools clean", "shard_tools pack", "vlal_dist.score_clip", "shard_tools merge")
    for stage in stages:
        command = [sys.executable, "-m", *stage.split(), "--config", CONFIG]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)


def train(name: str, *, precision: str, steps: int, folder: Path) -> tuple[list[Record], float]:
    """A run in a process of its own: what was heard at each step, and its validation mAP."""
    run, file = folder / f"{precision}-{name}", folder / f"{precision}-{name}.jsonl"
    command = [sys.executable, __file__, "--listen", str(file)]
    command += ["--nudge"] if name == "nudged" else []
    command += ["--double"] if precision == "fp64" else []
    command += ["--", "--config", CONFIG, "--paths.run", str(run), "--resume", "none"]
    named = "bf16" if precision == "bf16" else "fp32"
    command += ["--training.max_steps", str(steps), "--training.precision", named, *FULL]
    command += ["--observability.metrics", "false", *RUNS[name]]
    started = time.monotonic()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == steps, "one call of the operator per step"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mean_ap = [line["mAP"] for line in metrics if line["kind"] == "validation"][-1]
    backend = next(line for line in done.stderr.splitlines() if "selective loss by" in line)
    print(f"{precision} {name}: {time.monotonic() - started:.0f} s, {backend[9:]}", flush=True)
    return found, mean_ap


def marks(steps: int) -> list[int]:
    """Steps up to which a curve's largest difference is shown."""
    return [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n < steps] + [steps]


def curve(name: str, one: list[Record], other: list[Record]) -> tuple[str, str]:
    """Rows of the two tables of a pair of runs: equal draws, and how the losses part."""
    steps, both = len(one), list(zip(one, other, strict=True))
    masks, ignored = (sum(a[key] == b[key] for a, b in both) for key in ("mask", "counts"))
    sums = [(a["sums"], b["sums"]) for a, b in both]
    total = [relative(sum(a), sum(b)) for a, b in sums]
    worst = [max(relative(x, y) for x, y in zip(a, b, strict=True)) for a, b in sums]
    beyond = next((str(n) for n, value in enumerate(worst, 1) if value > BOUND), "never")
    by_term = [max(relative(a[n], b[n]) for a, b in sums) for n in range(len(TERMS))]
    equal = f"| {name} | {ignored}/{steps} | {masks}/{steps} | " + " | ".join(
        f"{value:.1e}" for value in (max(total), *by_term)
    )
    parting = f"| {name} | " + " | ".join(f"{max(worst[:n]):.1e}" for n in marks(steps))
    return f"{equal} |", f"{parting} | {beyond} |"


def same_logits(name: str, found: list[Record]) -> str:
    """A row: both operators on the logits along one run."""
    steps = len(found)
    total = max(relative(sum(r["sums"]), sum(r["same_logits_sums"])) for r in found)
    worst = max(
        relative(a, b) for r in found for a, b in zip(r["sums"], r["same_logits_sums"], strict=True)
    )
    row, gradient = (max(r[f"same_logits_{part}"] for r in found) for part in ("row", "gradient"))
    masks, counts = (sum(r[key] for r in found) for key in ("same_mask", "same_counts"))
    cells = " | ".join(f"{value:.1e}" for value in (total, worst, row, gradient))
    return f"| {name} | {counts}/{steps} | {masks}/{steps} | {cells} |"


def section(precision: str, runs: dict[str, tuple[list[Record], float]]) -> str:
    """The tables of a precision."""
    steps = len(runs["auto"][0])
    pairs = {name: pair for name, pair in PAIRS.items() if set(pair) <= set(runs)}
    rows = [curve(name, runs[a][0], runs[b][0]) for name, (a, b) in pairs.items()]
    ignored = sum(r["counts"][4] for r in runs["auto"][0])
    maps = ", ".join(f"{name} {100 * value:.2f}" for name, (_, value) in runs.items())
    head = "| runs | counts equal | ignored pairs equal | loss | " + " | ".join(TERMS) + " |"
    over = " | ".join(f"to step {n}" for n in marks(steps))
    beside = "| logits along the run by | counts equal | ignored pairs equal | loss | worst term "
    return "\n".join(
        [
            f"## {precision}",
            "",
            f"{steps} steps, {ignored:,} pairs ignored. Validation mAP at the end: {maps}.",
            "",
            "Both operators on the same logits at every step; largest relative difference, of the "
            "gradient in units of its largest element:",
            "",
            f"{beside}| worst row | gradient |",
            "|---|---|---|---|---|---|---|",
            same_logits("fused", runs["auto"][0]),
            same_logits("reference", runs["reference"][0]),
            "",
            "Two runs, each by itself; steps with equal counts of all five terms and with the same "
            "ignored pairs, and the largest relative difference of a step's losses over the run:",
            "",
            head,
            "|---" * (4 + len(TERMS)) + "|",
            *(equal for equal, _ in rows),
            "",
            "How they part: largest relative difference of any term, up to a step, and the first "
            f"step at which it is above {BOUND:.0e}:",
            "",
            f"| runs | {over} | first above |",
            "|---" * (2 + len(marks(steps))) + "|",
            *(parting for _, parting in rows),
            "",
        ]
    )


TEXT = """\
# The loss curve by the fused operator and by the reference

{date}, a shared two-core machine (x86_64, 24 GB), operator compiled for {variant}:

    FASHION12K=FOLDER python benchmarks/loss/loss_curve.py --markdown docs/benchmarks/loss-curve.md

configs/fashion12k.yaml (8,390 real photos, 248 attributes, 64 pixels, ResNet-18 from scratch,
batch 64, the selective loss with 30 attributes drawn per photo, over the feasible ones); one
process, one seed, {steps} steps (131 are an epoch) with the cosine over them; in fp32, in bf16,
and for {double} steps in fp64, which only this benchmark can. Ignored
pairs are compared as bits, with their samples; losses as the trainer adds them up.

On the same logits the operators differ by float32 rounding. Two free runs part further, as any two
runs do whose last bits differ: Adam's first steps divide a gradient by its own size, so that an
element which is rounding alone moves its weight as far as any other. How much of it is the
operator's is told by the reference beside itself, its loss times 1 + 2^-23, and by fp64, where last
bits are too small to grow up within the run.

{sections}"""


def main() -> None:
    """Train and compare, or, with --listen, be the run that is listened to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=131)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bench-loss-curve")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--listen", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--nudge", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--double", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("train", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.listen:
        from vlal_dist import train as program

        listen(given.listen, nudge=given.nudge)
        if given.double:
            in_double()
        sys.argv[1:] = given.train
        sys.exit(program.main())
    prepare()
    given.folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for precision in given.precisions:
        double = precision == "fp64"  # slow: shorter, and without the runs that show last bits
        steps = min(given.steps, DOUBLE_STEPS) if double else given.steps
        settings = {"precision": precision, "steps": steps, "folder": given.folder}
        names = ("auto", "reference") if double else tuple(RUNS)
        sections.append(section(precision, {name: train(name, **settings) for name in names}))
        print(sections[-1], flush=True)
    from vlal_dist.kernels.cpu import instruction_set

    text = TEXT.format(
        date=time.strftime("%Y-%m-%d"),
        variant=instruction_set(),
        steps=given.steps,
        double=DOUBLE_STEPS,
        sections="\n".join(sections).rstrip() + "\n",
    )
    if given.markdown:
        given.markdown.write_text(text)


if __name__ == "__main__":
    main()
