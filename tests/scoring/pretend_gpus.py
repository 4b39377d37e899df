"""Three actors of half a GPU each on a Ray that pretends to have one: two of them find a place.

`python -m tests.scoring.pretend_gpus` prints one line of JSON; no GPU is used, only Ray's counting.
"""

import json
import os
import time

from vlal_dist.scoring import actors
from vlal_dist.scoring.actors import ActorPool, Call, ScoringActor
from vlal_dist.scoring.ray_session import LOCAL_ENVIRONMENT, OBJECT_STORE_BYTES
from vlal_dist.scoring.worker import ScoringJob, never

JOB = ScoringJob(
    dataset="",
    cache="",
    scores="",
    model="",
    model_config_dir=None,
    weights=None,
    templates=(),
    scorer_digest="",
    precision="fp32",
    device="cuda",
    compiled=False,
    threads=1,
    temperature=0.07,
)


class PlacedActor(ScoringActor):
    """Opens nothing; says where it was placed."""

    def open(self) -> int:
        """The process id."""
        return os.getpid()

    def where(self, number: int) -> tuple[int, str | None]:
        """The process id, and the GPUs that it may see."""
        time.sleep(0.2)
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def main() -> None:
    """Place, ask, tell."""
    os.environ.update(LOCAL_ENVIRONMENT)
    import ray

    actors.ScoringActor = PlacedActor  # type: ignore[misc]
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    pool = ActorPool(
        JOB, size=3, cpus_per_actor=1, gpus_per_actor=0.5, max_retries=0, stopped=never
    )
    calls: list[Call] = [("where", (number,)) for number in range(40)]
    found = list(pool.run(calls))
    print(json.dumps({"answers": len(found), "places": sorted({*found})}))
    ray.shutdown()


if __name__ == "__main__":
    main()
