"""A driver on a Ray of its own that counts a shard twice a second until its input ends.

`python -m tests.scoring.ray_exporter FILE`: FILE becomes a target file of the node's exporter.
"""

import json
import sys
import threading
from pathlib import Path

from vlal_dist.scoring.ray_metrics import RayMetrics
from vlal_dist.scoring.ray_session import ray_session
from vlal_dist.scoring.result import ShardResult
from vlal_dist.scoring.seconds import Seconds


def result(number: int) -> ShardResult:
    return ShardResult(
        split="train",
        shard=number,
        samples=11,
        images=10,
        created=bool(number % 2),
        identical=True,
        quality=None,  # type: ignore[arg-type]
        quarantined={1: "no image"},
        seconds=Seconds(fetch=0.1, decode=0.2, copy=0.3, encode=0.4, write=0.5),
    )


def main(file: Path) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    with ray_session(actors=1, cpus_per_actor=1):
        import ray

        metrics = RayMetrics(run="s3://bucket/scores")
        metrics.pending(1000)
        (node,) = ray.nodes()
        where = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps([{"targets": [where], "labels": {}}]))
        unfinished.rename(file)
        for number in range(1000):
            metrics.publish("not about a shard", left=0, retried=0)
            metrics.publish(result(number), left=1000 - number, retried=number // 2)
            if ended.wait(0.5):
                return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
