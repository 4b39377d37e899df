"""`python -m vlal_dist.predict`: attributes of objects in any photos, by an exported model."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from vlal_dist.config.sections import Config, PredictConfig
from vlal_dist.data.format.photos import Photos, open_photos
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.observability.logs import Progress
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.release.model import ExportedModel, load_exported
from vlal_dist.release.predict import predict_requests
from vlal_dist.release.prediction_files import open_output, open_rejects
from vlal_dist.release.requests import (
    Record,
    Reject,
    Request,
    folder_records,
    parse_rows,
    read_table,
)

PURPOSE = """
Write the likeliest attributes of objects in photos, with probabilities. Reads a folder that export
wrote (predict.model; no dataset, no run) and photos: all of a folder, each as a whole an object
named predict.object, or those of a table with a row per object (image, object, box). Crops are made
as for training. Rows that cannot be used are listed with their reason; 65 only if none could be. A
repeated command starts anew and replaces the file. Where there is no configuration the defaults are
taken.
"""


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Open everything, predict, write; returns the closing counts."""
    settings = config.predict
    model = load_exported(settings.model or config.paths.export)
    if settings.thresholds and model.thresholds is None:
        raise ConfigError(
            f"predict.thresholds: {settings.model or config.paths.export} holds none; run evaluate "
            "on the validation split and export again, or leave predict.thresholds false"
        )
    photos, requests, total = _requests(settings, model)
    model.network.to("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(settings.output)
    rejects = output.with_name(f"{output.stem}.rejects.jsonl")
    names = model.info.vocabulary.attributes
    with (
        Progress("predict", total=total, unit="objects") as progress,
        open_rejects(rejects) as write_reject,
        open_output(output, names, thresholds=settings.thresholds) as write,
    ):
        answered, rejected = predict_requests(
            model,
            requests,
            photos,
            write=write,
            write_reject=write_reject,
            top_k=settings.top_k,
            thresholds=settings.thresholds,
            batch_size=settings.batch_size,
            threads=settings.threads,
            max_pixels=settings.max_pixels,
            advance=progress.advance,
        )
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
    if not answered:
        output.unlink()
        raise DataError(
            f"nothing could be predicted: {reasons or 'there are no rows and no photos'}"
            + (f"; {rejects} names each" if rejected else "; see predict.images, predict.table")
        )
    counts: Counts = {"objects": answered, "rejected": rejected.total(), "output": str(output)}
    if rejected:
        counts |= {"reasons": dict(rejected), "rejects": str(rejects)}
    return counts


def _requests(
    settings: PredictConfig, model: ExportedModel
) -> tuple[Photos, Iterable[Request | Reject], int]:
    """Where photos are, what is asked of them, and how much that is (0: not known)."""
    if settings.object is not None:
        try:
            model.object_id(settings.object)
        except DataError as error:
            raise ConfigError(f"predict.object: {error}") from None
    records: Iterable[Record | DataError]
    if settings.table is not None:
        table = Path(settings.table)
        records, total = read_table(table)
        photos = open_photos(settings.images or str(table.parent), key="predict.images")
    elif settings.images is not None:
        if settings.object is None and model.info.model.object_gate:
            raise ConfigError(
                "predict.object is absent: this model needs the name of the object that the "
                "photos show; give it, or a predict.table with the columns image and object"
            )
        photos = open_photos(settings.images, key="predict.images")
        names = photos.names()
        records, total = folder_records(names), len(names)
    else:
        raise ConfigError("predict.images and predict.table are absent; give one of them")
    return (
        photos,
        parse_rows(records, object_name=settings.object, object_id=model.object_id),
        total,
    )


PROGRAM = Program(
    name="predict",
    usage="python -m vlal_dist.predict",
    purpose=PURPOSE,
    sections=("predict", "paths", "observability"),
    flags=("json",),
    output=lambda config, flags: str(Path(config.predict.output).parent),
    work=work,
    needs_config=False,
)


def main() -> int:
    """Run the program on the command line's arguments."""
    return run_program(PROGRAM, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
