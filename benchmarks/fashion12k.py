"""Six losses on real, natively partially labelled photos: `FASHION12K=FOLDER make fashion12k`.

Runs the programs as a user would, one after another, printing each command: clean, pack,
score_clip, merge; then for every row of Table 1 a DeepSpeed run of two ranks and its test
evaluation; then the constant and the zero-shot CLIP rows. A finished stage is not run again, so
the command can be repeated after an interruption. The table goes to runs/fashion12k/table.md.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/fashion12k.yaml"
RUNS = ROOT / "runs/fashion12k"
LOSSES = ("ce_ignoring", "ce_negatifying", "asl_ignoring", "asl_negatifying", "psl", "selective")
NAMES = {
    "constant": "constant score",
    "clip": "zero-shot CLIP",
    "ce_ignoring": "CE-ignoring",
    "ce_negatifying": "CE-negatifying",
    "asl_ignoring": "ASL-ignoring",
    "asl_negatifying": "ASL-negatifying",
    "psl": "PSL",
    "selective": "selective (ours)",
}


def call(*words: str) -> float:
    """Run one command from the repository root; end with its code when it fails."""
    print("$ " + " ".join(words), flush=True)
    started = time.monotonic()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    code = subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode
    seconds = time.monotonic() - started
    print(f"  {seconds:.0f} s", flush=True)
    if code:
        raise SystemExit(code)
    return seconds


def train(loss: str) -> None:
    """Train one row of Table 1 on two ranks, and evaluate its best model on test."""
    run = f"runs/fashion12k/{loss}"
    result = ROOT / run / "evaluation/test-model/result.json"
    if result.is_file():
        print(f"{loss}: already evaluated, see {result.relative_to(ROOT)}")
        return
    arguments = ["--config", CONFIG, "--paths.run", run, "--method.loss", loss]
    if loss == "psl":
        # PSL's prior: mean probability over training of the same seed's CE-ignoring model.
        prior = "runs/fashion12k/ce_ignoring"
        module = [sys.executable, "-m", "vlal_dist.evaluate", "--config", CONFIG]
        call(*module, "--paths.run", prior, "--evaluation.split", "train")
        arguments += ["--method.psl_prior", f"{prior}/evaluation/train-model/attributes.parquet"]
    begun = (ROOT / run / "metrics.jsonl").exists()  # by an earlier attempt: no time is given
    seconds = call("deepspeed", "--num_accelerators", "2", "vlal_dist/train.py", *arguments)
    evaluate(run, "model")
    facts = json.loads(result.read_text())
    if not begun:
        result.with_name("seconds.json").write_text(json.dumps({"training_s": round(seconds)}))
    print(f"{loss}: test mAP {facts['groups'][0]['mAP']:.4f}")


def evaluate(run: str, predictor: str) -> None:
    """Evaluate on test."""
    module = [sys.executable, "-m", "vlal_dist.evaluate", "--config", CONFIG, "--paths.run", run]
    call(*module, "--evaluation.predictor", predictor)


def row(name: str, path: Path) -> str:
    """A line of the table from a result.json."""
    result = json.loads(path.read_text())
    groups = {group["name"]: group for group in result["groups"]}
    cells = [f"{100 * groups[key]['mAP']:.2f}" for key in ("overall", "head", "medium", "tail")]
    timing = path.with_name("seconds.json")
    seconds = json.loads(timing.read_text())["training_s"] if timing.is_file() else "-"
    return f"| {name} | " + " | ".join(cells) + f" | {seconds} |"


def curve(loss: str) -> str:
    """Validation mAP after each epoch."""
    lines = (RUNS / loss / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    values = [f"{100 * one['mAP']:.2f}" for one in found if one["kind"] == "validation"]
    return f"| {NAMES[loss]} | " + " | ".join(values) + " |"


def main() -> None:
    """Everything, then the table."""
    if not os.environ.get("FASHION12K"):
        raise SystemExit("set FASHION12K to the folder that holds train.json and images.zip")
    for stage in ("clean", "pack"):
        call(sys.executable, "-m", "shard_tools", stage, "--config", CONFIG)
    call(sys.executable, "-m", "vlal_dist.score_clip", "--config", CONFIG)
    call(sys.executable, "-m", "shard_tools", "merge", "--config", CONFIG)
    for predictor in ("constant", "clip"):
        evaluate("runs/fashion12k/baselines", predictor)
    for loss in LOSSES:
        train(loss)
    folder = RUNS / "baselines/evaluation"
    rows = [row(NAMES[name], folder / f"test-{name}/result.json") for name in ("constant", "clip")]
    rows += [row(NAMES[name], RUNS / name / "evaluation/test-model/result.json") for name in LOSSES]
    head = "| row | test mAP | head | medium | tail | training s |\n|---|---|---|---|---|---|\n"
    curves = "\n".join(curve(loss) for loss in LOSSES)
    epochs = max(line.count("|") - 2 for line in curves.splitlines())
    over = f"| validation mAP after epoch | {' | '.join(map(str, range(1, epochs + 1)))} |"
    rule = "|---" * (epochs + 1) + "|"
    text = head + "\n".join([*rows, "", over, rule, curves]) + "\n"
    (RUNS / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
