"""`vlal score`, or `python -m vlal_dist.score_clip`: CLIP similarities of crops (Sec. 2.2).

The same command continues after any interruption: shards whose score file exists are skipped.
"""

import sys
from collections.abc import Mapping

from vlal_dist.config.sections import Config
from vlal_dist.pipeline import score_inputs
from vlal_dist.program import Counts, Program, make_way, run_program
from vlal_dist.ray_tasks import refuse_relative_in_job
from vlal_dist.scoring.driver import score_dataset
from vlal_dist.scoring.identity import WEIGHTS
from vlal_dist.scoring.object_vectors import make_object_vectors
from vlal_dist.storage.earlier import Owned


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Score the dataset, or write object vectors where `--object-vectors FILE` is given."""
    if "object-vectors" not in flags:
        return score_dataset(
            config.scoring,
            config.paths,
            plan_only="plan" in flags,
            retry_quarantined="retry-quarantined" in flags,
            retry_rejected="retry-rejected" in flags,
            make_way=lambda: make_way(PROGRAM, config, flags),
        )
    path, instances = flags["object-vectors"], config.paths.instances
    refuse_relative_in_job("--object-vectors", path)
    refuse_relative_in_job("paths.instances", instances)
    return make_object_vectors(path, instances=instances, scoring=config.scoring)


PROGRAM = Program(
    name="score_clip",
    usage="vlal score",
    purpose=(
        "Embed every crop with CLIP and write its cosine with the prompt of each attribute that is "
        "feasible for its object. Runs on the Ray it is submitted to (ray job submit), else starts "
        "one on this machine. Repeat the command to continue."
    ),
    sections=("paths", "scoring", "observability"),
    flags=("plan", "json", "retry-quarantined", "retry-rejected", "replace", "object-vectors"),
    output=lambda config, flags: (
        config.paths.instances if "object-vectors" in flags else config.paths.scores
    ),
    work=work,
    shown=("shards_scored", "shards_skipped", "samples", "images_per_s", "quality.auc"),
    inputs=score_inputs,
    owned=Owned(
        r"(scores|weights|settings-[0-9a-f]{16})\.json|text-[0-9a-f]{16}\.safetensors"
        r"|[^/]+/[0-9a-f]{16}-[0-9a-f]{16}\.safetensors",
        first=WEIGHTS,
        last="scores.json",
    ),
)


if __name__ == "__main__":
    sys.exit(run_program(PROGRAM, sys.argv[1:]))
