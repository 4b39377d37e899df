"""`vlal evaluate`: one split, one predictor, one row of Table 1 (Sec. 3.1)."""

import json
import logging
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from vlal_dist.config.sections import Config, evaluation_folder
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.loader import evaluation_batches
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.concat import ConcatSplits
from vlal_dist.errors import VlalError
from vlal_dist.evaluation.dense_labels import read_dense_labels
from vlal_dist.evaluation.predictions import Predictions, merge_predictions, save_predictions
from vlal_dist.evaluation.predictors import predict, predict_clip, predict_constant
from vlal_dist.evaluation.results import (
    build_result,
    encode_attributes,
    find_folder,
    format_row,
    protocol_note,
)
from vlal_dist.method.metrics import counted_labels, evaluate
from vlal_dist.method.model import AttributeClassifier
from vlal_dist.observability.logs import Progress
from vlal_dist.pipeline import evaluate_inputs
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.release.saved_model import SavedModelInfo, load_saved_model
from vlal_dist.remarks import remark
from vlal_dist.storage.store import open_store

logger = logging.getLogger(__name__)

PURPOSE = """
Score every crop of a split (paths.dataset) with the run's best model, a constant, or zero-shot
CLIP similarity (paths.scores), and write predictions, per-attribute figures and result.json below
RUN/evaluation. A repeated evaluation overwrites the earlier one; one of another dataset than the
run's own stands beside it, under that dataset's name and digest. Image size and normalisation are
the saved model's own; arithmetic is float32.
"""


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Evaluate, write, show the row; returns the closing counts."""
    settings = config.evaluation
    dataset = open_dataset(config.paths.dataset, cache=Path(config.paths.cache))
    store = open_store(config.paths.run)
    info = dense = None
    if settings.predictor == "constant":
        predictions = predict_constant(dataset, settings.split)
    elif settings.predictor == "clip":
        scores = open_store(config.paths.scores)
        predictions = predict_clip(dataset, settings.split, scores=scores)
    else:
        model, info = load_saved_model(store, "best", vocabulary=dataset.vocabulary)
        predictions = _predict_split(model, info, dataset, config)
    if settings.truth is not None:
        dense = read_dense_labels(settings.truth, dataset, settings.split)
    evaluation = evaluate(
        predictions.score,
        counted_labels(predictions.label, settings.unannotated),
        groups=dataset.vocabulary.groups(),
        top_k=settings.top_k,
        threshold=settings.threshold,
    )
    described = None if info is None else info.to_json()
    result = build_result(settings, dataset, predictions, evaluation, model=described, dense=dense)
    folder = find_folder(store, dataset, split=settings.split, predictor=settings.predictor)
    if folder != evaluation_folder(settings.split, settings.predictor):
        logger.info(
            "%s is another dataset than the run's own: its results are written to %s",
            dataset.url,
            folder,
        )
    save_predictions(store, f"{folder}/predictions.safetensors", predictions)
    table = encode_attributes(evaluation.attributes, predictions.score, dataset.vocabulary)
    store.replace(f"{folder}/attributes.parquet", table)
    store.replace(f"{folder}/result.json", (json.dumps(result, indent=2) + "\n").encode())
    sys.stdout.write(format_row(result) + "\n")
    overall = result["groups"][0]
    if not overall["num_classes"]:
        remark(
            logger,
            "evaluation.unannotated",
            "no attribute has both a positive and a negative in split %s, so its mAP is undefined; "
            "if the data lists only what is present (tags), set evaluation.unannotated negative",
            settings.split,
        )
    counts: Counts = {
        "dataset": dataset.name,
        "samples": result["num_samples"],
        "attributes": overall["num_attributes"],
        "attributes_counted": overall["num_classes"],
        "mAP": overall["mAP"],
        "result": f"{config.paths.run}/{folder}/result.json",
    }
    if note := protocol_note(settings.unannotated):
        counts["note"] = note
    if dense is not None:
        counts["mAP_complete_labels"] = result["truth"]["groups"][0]["mAP"]
    return counts


def _predict_split(
    model: AttributeClassifier, info: SavedModelInfo, dataset: Dataset, config: Config
) -> Predictions:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = open_split(dataset, config.evaluation.split)
    # The model's own input; each crop is seen once, so that none is worth keeping.
    own = {"image_size": info.image_size, "normalize": info.normalize, "decoded_bytes": 0}
    builder = BatchBuilder(
        ShardReader(ConcatSplits([split])), dataset, config.data.model_copy(update=own)
    )
    rows = np.arange(split.num_samples, dtype=np.int64)
    shown = Progress(f"evaluate {split.name}", total=len(rows), unit="samples")
    with closing(builder), shown as progress:
        found = predict(
            model.to(device),
            evaluation_batches(builder, rows, batch_size=config.evaluation.batch_size),
            num_attributes=info.num_attributes,
            device=device,
            advance=progress.advance,
        )
    return merge_predictions([found], num_samples=len(rows))


def _folder(config: Config) -> str:
    """Where the result is recorded: beside `result.json`, or where the run's own would be."""
    split, predictor = config.evaluation.split, config.evaluation.predictor
    try:
        dataset = open_dataset(config.paths.dataset, cache=Path(config.paths.cache))
        return find_folder(open_store(config.paths.run), dataset, split=split, predictor=predictor)
    except (VlalError, OSError):  # the work reports it
        return evaluation_folder(split, predictor)


PROGRAM = Program(
    name="evaluate",
    usage="vlal evaluate",
    purpose=PURPOSE,
    sections=("paths", "evaluation", "data", "observability"),
    output=lambda config, flags: config.paths.run,
    work=work,
    shown=("dataset", "samples", "attributes_counted", "mAP", "mAP_complete_labels", "note"),
    inputs=evaluate_inputs,
    record=_folder,
)


if __name__ == "__main__":
    sys.exit(run_program(PROGRAM, sys.argv[1:]))
