"""Are the scores right? Our score files beside a plain open_clip loop, bf16, and re-scoring.

    FASHION12K=FOLDER python benchmarks/scoring/equality.py [--quick] [--keep]
        [--markdown FILE] [--json FILE]

On 12,000 real product photos with the trained CLIP of configs/fashion12k.yaml:

* fp32: likelihoods of Eq. (2) from our score files against those of score_plain.py, one image at a
  time with open_clip alone: the largest difference over all crops;
* bf16 against fp32: differences, and how far the ranking of the attributes changes;
* re-scored from stored embeddings against scored from images: bytes of the files.

Our side is the program, run as a user would. Its folders are made anew unless --keep is given.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.scoring.plain import PlainScorer  # noqa: E402
from vlal_dist.data.format.dataset import open_dataset, open_split, read_labels  # noqa: E402
from vlal_dist.data.format.scores import ShardScores, finished_manifest, read_shard_scores  # noqa: E402
from vlal_dist.method.likelihood import log_likelihood  # noqa: E402
from vlal_dist.storage.store import open_store  # noqa: E402

CONFIG = "configs/fashion12k.yaml"
DATASET = ROOT / "runs/fashion12k/dataset"
RUNS = ROOT / "runs/bench-score-equality"
TARGET = 1e-5
TOP = 5
Floats = npt.NDArray[np.float32]
Values = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """All crops of some splits in the dataset's order, rows end to end."""

    similarity: Floats
    likelihood: Floats
    indptr: npt.NDArray[np.int64]
    keys: list[str]


def call(*words: str) -> None:
    """Run a module of the repository; end with its code when it fails."""
    print("$ python " + " ".join(words), flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)


def score(name: str, splits: Sequence[str], *more: str) -> Values:
    """Score into a folder of ours; returns the program's counts."""
    told = RUNS / f"{name}.json"
    call(
        *("-m", "vlal_dist.score_clip", "--config", CONFIG),
        *("--paths.scores", str((RUNS / name).relative_to(ROOT))),
        *("--scoring.use_ray", "false"),
        *("--scoring.splits", f"[{', '.join(splits)}]"),
        *("--json", str(told.relative_to(ROOT))),
        *more,
    )
    found: Values = json.loads(told.read_text())
    return found


def read_scores(name: str, splits: Sequence[str]) -> Scored:
    """Our score files of a folder, and their likelihoods at its temperature."""
    dataset = open_dataset(str(DATASET), cache=ROOT / "runs/cache")
    store = open_store(str(RUNS / name))
    manifest = finished_manifest(store)
    found: list[ShardScores] = []
    keys: list[str] = []
    for one in splits:
        for shard in open_split(dataset, one).shards:
            found.append(
                read_shard_scores(store, one, shard_sha256=shard.sha256, manifest=manifest)
            )
        keys += read_labels(dataset, one, columns=["key"])["key"].to_pylist()
    similarity = np.concatenate([scores.similarity for scores in found])
    sizes = np.concatenate([np.diff(scores.indptr) for scores in found])
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    logs = log_likelihood(similarity, indptr, temperature=float(manifest["temperature"]))
    return Scored(similarity, np.exp(logs), indptr, keys)


def score_plainly(splits: Sequence[str]) -> Scored:
    """The plain loop."""
    folder = Path(os.environ["FASHION12K"]).parents[1] / "models/fashion_clip"
    scorer = PlainScorer(DATASET, model=folder.name, folder=folder)
    found = []
    for split in splits:
        for one in scorer.score(split):
            found.append(one)
            if len(found) % 1000 == 0:
                print(f"plain loop: {len(found)} crops", flush=True)
    indptr = np.concatenate([[0], np.cumsum([len(one.similarity) for one in found])])
    similarity, likelihood = (
        np.concatenate([getattr(one, name) for one in found])
        for name in ("similarity", "likelihood")
    )
    return Scored(similarity, likelihood, indptr, [one.key for one in found])


def differences(one: Scored, other: Scored) -> Values:
    """Largest and mean absolute difference of similarity and likelihood."""
    assert one.keys == other.keys, "the crops come in another order"
    assert np.array_equal(one.indptr, other.indptr)
    found: Values = {"crops": len(one.keys), "pairs": len(one.similarity)}
    for name in ("similarity", "likelihood"):
        distance = np.abs(getattr(one, name).astype(np.float64) - getattr(other, name))
        found[f"{name}_largest"] = float(distance.max())
        found[f"{name}_mean"] = float(distance.mean())
    return found


def rankings(one: Scored, other: Scored) -> Values:
    """How alike the two rank the feasible attributes of each crop.

    By similarity, which ranks as the likelihood does (one increases with the other) and has fewer
    ties in float32. Crops with one feasible attribute have no ranking.
    """
    correlation, top, top_set = [], [], []
    for a, b in _rows(one, other):
        if len(a) < 2:
            continue
        correlation.append(float(np.corrcoef(ranks(a), ranks(b))[0, 1]))
        top.append(a.argmax() == b.argmax())
        if len(a) > TOP:
            top_set.append(set(a.argsort()[-TOP:].tolist()) == set(b.argsort()[-TOP:].tolist()))
    return {
        "ranked_crops": len(correlation),
        "spearman_mean": float(np.mean(correlation)),
        "spearman_percentile_1": float(np.percentile(correlation, 1)),
        "spearman_least": float(np.min(correlation)),
        "top_1_equal": float(np.mean(top)),
        "crops_with_more_than_5": len(top_set),
        "top_5_equal": float(np.mean(top_set)),
    }


def ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: npt.NDArray[np.float64] = (np.cumsum(count) - (count + 1) / 2)[place]
    return mean


def _rows(one: Scored, other: Scored) -> Iterator[tuple[Floats, Floats]]:
    for start, stop in zip(one.indptr[:-1].tolist(), one.indptr[1:].tolist(), strict=True):
        yield one.similarity[start:stop], other.similarity[start:stop]


@dataclass(frozen=True)
class Files:
    """How many files of one folder are equal, byte for byte, to those of the other."""

    score_files: int
    equal: int
    text_bank_equal: bool
    scores_json_equal: bool


def compare_files(name: str, other: str) -> Files:
    """Compare two score roots."""
    one, two = RUNS / name, RUNS / other
    files = sorted(path.relative_to(one) for path in one.glob("*/*.safetensors"))
    (bank,) = one.glob("text-*.safetensors")

    def same(path: Path) -> bool:
        return (two / path).is_file() and (one / path).read_bytes() == (two / path).read_bytes()

    return Files(
        score_files=len(files),
        equal=sum(map(same, files)),
        text_bank_equal=same(bank.relative_to(one)),
        scores_json_equal=same(Path("scores.json")),
    )


TEXT = """\
fp32 beside a plain open_clip loop, one image at a time ({fp32[crops]:,} crops, \
{fp32[pairs]:,} similarities):

| | largest difference | mean difference |
|---|---|---|
| similarity | {fp32[similarity_largest]:.1e} | {fp32[similarity_mean]:.1e} |
| likelihood, Eq. (2) | {fp32[likelihood_largest]:.1e} | {fp32[likelihood_mean]:.1e} |

The target is a likelihood within {target:.0e}: {verdict}.

bf16 beside fp32, both ours:

| | |
|---|---|
| similarity, largest and mean difference | {bf16[similarity_largest]:.1e}, \
{bf16[similarity_mean]:.1e} |
| likelihood, largest and mean difference | {bf16[likelihood_largest]:.1e}, \
{bf16[likelihood_mean]:.1e} |
| rank correlation of a crop's feasible attributes (Spearman): mean, 1st percentile, least \
| {bf16[spearman_mean]:.5f}, {bf16[spearman_percentile_1]:.5f}, {bf16[spearman_least]:.5f} |
| crops with the same first attribute | {bf16[top_1_equal]:.2%} |
| crops with the same set of the first five | {bf16[top_5_equal]:.2%} |
| AUC of annotated positives over negatives: fp32, bf16 | {auc_fp32:.6f}, {auc_bf16:.6f} |

Re-scored from the stored embeddings, same prompts: {files[equal]} of {files[score_files]} score \
files equal byte for byte (largest difference of a similarity \
{rescored[similarity_largest]:.1e}), text bank equal: {files[text_bank_equal]}, scores.json equal: \
{files[scores_json_equal]}.
"""


def main() -> None:
    """Score three times and plainly, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the validation split alone")
    parser.add_argument("--keep", action="store_true", help="use what an earlier call scored")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not os.environ.get("FASHION12K"):
        raise SystemExit("set FASHION12K to the folder that holds train.json and images.zip")
    splits = ["val"] if arguments.quick else ["train", "val", "test"]
    if not (DATASET / "dataset.json").is_file():
        for stage in ("clean", "pack"):
            call("-m", "shard_tools", stage, "--config", CONFIG)
    if not arguments.keep:
        shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    suffix = "-quick" if arguments.quick else ""
    fp32, bf16, rescored = (f"{name}{suffix}" for name in ("fp32", "bf16", "rescored"))
    counts = {
        "fp32": score(fp32, splits, "--scoring.precision", "fp32"),
        "bf16": score(bf16, splits, "--scoring.precision", "bf16"),
    }
    embeddings = ("--scoring.embeddings", str((RUNS / fp32).relative_to(ROOT)))
    counts["rescored"] = score(rescored, splits, "--scoring.precision", "fp32", *embeddings)
    ours, rough = read_scores(fp32, splits), read_scores(bf16, splits)
    found: Values = {
        "target": TARGET,
        "fp32": differences(ours, score_plainly(splits)),
        "bf16": differences(ours, rough) | rankings(ours, rough),
        "rescored": differences(ours, read_scores(rescored, splits)),
        "files": asdict(compare_files(fp32, rescored)),
        **{f"auc_{name}": counts[name]["quality"]["auc"] for name in ("fp32", "bf16")},
        "images_per_s": {name: one["images_per_s"] for name, one in counts.items()},
    }
    within = found["fp32"]["likelihood_largest"] <= TARGET
    text = TEXT.format(verdict="met" if within else "MISSED", **found)
    print("\n" + text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
