"""`vlal predict`: attributes of objects in any photos, by an exported model."""

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from vlal_dist.config.sections import Config
from vlal_dist.data.format.photos import LEFT_OUT, printable
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.observability.logs import Progress
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.release.model import load_model
from vlal_dist.release.predict import predict_requests
from vlal_dist.release.prediction_files import open_output, open_rejects
from vlal_dist.release.requests import Reject, open_requests

PURPOSE = """
Write the likeliest attributes of objects in photos, with probabilities. Reads a folder that export
wrote (predict.model; no dataset, no run) and photos: all of a folder, zip, tar, Parquet file or
bucket, or a single one, each as a whole an object named predict.object, or those of a table with a
row per object (image, object, box). The model does not detect objects: you name the object, and a
wrong name gives confident nonsense. Crops are made as for training. Rows that cannot be used are
listed with their reason, files that are no photos are counted; 65 only if none could be used. A
repeated command replaces the file.
"""


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Open everything, predict, write; returns the closing counts."""
    settings = config.predict
    folder = settings.model or config.paths.export
    model = load_model(folder)
    if settings.thresholds and model.thresholds is None:
        raise ConfigError(
            f"predict.thresholds: {folder} holds none; run vlal evaluate on the validation split "
            "and vlal export again, or leave predict.thresholds false"
        )
    photos, requests, total = open_requests(settings, model)
    model.network.to("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(settings.output)
    rejects = output.with_name(f"{output.stem}.rejects.jsonl")
    objects, rejected, first = 0, Counter[str](), ""
    with (
        Progress("predict", total=total, unit="objects") as progress,
        open_rejects(rejects) as write_reject,
        open_output(output, thresholds=settings.thresholds) as write,
    ):
        for found in predict_requests(model, requests, photos, settings):
            if isinstance(found, Reject):
                progress.advance()
                if found.reason == LEFT_OUT:
                    photos.left_out[found.detail] += 1
                    continue
                write_reject(found)
                rejected[found.reason] += 1
                first = first or f"row {found.row}: {found.reason}: {found.detail}"
            else:
                write(found)
                objects += len(found)
                progress.advance(len(found))
    if not objects:
        output.unlink()
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
        left_out = ", ".join(f"{reason} {count}" for reason, count in photos.left_out.items())
        raise DataError(
            f"nothing could be predicted: {reasons or 'there are no rows and no photos'}"
            + (f"; left out: {left_out}" if left_out else "")
            + (f"; {rejects} names each, the first: {printable(first, length=600)}" if rejected
               else "; see predict.images, predict.table")
        )  # fmt: skip
    counts: Counts = {
        "objects": objects,
        "rejected": rejected.total(),
        "output": printable(str(output), length=4096),
    }
    if rejected:
        counts |= {"reasons": dict(rejected), "rejects": printable(str(rejects), length=4096)}
    if photos.left_out:
        counts["left_out"] = dict(photos.left_out)
    return counts


PROGRAM = Program(
    name="predict",
    usage="vlal predict",
    purpose=PURPOSE,
    sections=("predict", "paths", "observability"),
    output=lambda config, flags: str(Path(config.predict.output).parent),
    writes=lambda config, flags: (
        (str(Path(config.predict.output).parent), f"predict {Path(config.predict.output).stem}"),
    ),
    work=work,
    shown=("objects", "rejected", "reasons", "left_out", "output"),
)


if __name__ == "__main__":
    sys.exit(run_program(PROGRAM, sys.argv[1:]))
