"""clip-retrieval's `clip_inference` on the same tars; runs in `.clip-retrieval`.

Choices: its `open_clip:` branch with a local checkpoint (the same weights as ours), sequential
distribution, images only, one process with two torch threads and one preprocessing worker: the
same two cores. It loads the JPEG with Pillow, does not cut boxes (ours are whole crops) and writes
float16 embeddings. The count and the seconds are its own statistics: from the first batch asked for
to the last one encoded; loading and warming up the model lie before that, writing after it.
"""

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory


def main() -> None:
    """Embed all tars of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path, help="folder of tars")
    parser.add_argument("--model", required=True, help="open_clip name")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise SystemExit("2 cores are needed")
    os.sched_setaffinity(0, allowed[-2:])
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    from clip_retrieval import clip_inference

    tars = sorted(str(path) for path in arguments.shards.glob("*.tar"))
    with TemporaryDirectory() as output:
        clip_inference(
            input_dataset="{" + ",".join(tars) + "}",
            output_folder=output,
            input_format="webdataset",
            batch_size=arguments.batch,
            num_prepro_workers=arguments.workers,
            enable_text=False,
            enable_metadata=False,
            clip_model=f"open_clip:{arguments.model}/{arguments.weights.resolve()}",
            output_partition_count=1,
        )
        stats = json.loads(Path(output, "stats/0.json").read_text())
    print(json.dumps({"count": stats["sample_count"], "seconds": stats["total_duration"]}))


if __name__ == "__main__":
    main()
