"""`vlal export`: the run's best model as a folder that loads without the dataset."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlal_dist.config.sections import Config, evaluation_folder
from vlal_dist.data.format.dataset import open_dataset
from vlal_dist.data.format.images import WHITE
from vlal_dist.errors import NotFoundError
from vlal_dist.evaluation.predictions import as_counted, load_predictions
from vlal_dist.evaluation.results import read_result, unannotated_of
from vlal_dist.pipeline import export_inputs
from vlal_dist.program import Counts, Program, run_program
from vlal_dist.release.model import ONNX, THRESHOLDS, WEIGHTS, ExportInfo, write_export
from vlal_dist.release.model_card import model_card
from vlal_dist.release.onnx_export import export_onnx, require_onnx
from vlal_dist.release.saved_model import SavedModelInfo, encode_weights, load_saved_model
from vlal_dist.release.thresholds import Thresholds, encode_thresholds, learn_thresholds
from vlal_dist.remarks import remark
from vlal_dist.storage.store import Store, open_store

logger = logging.getLogger(__name__)

PURPOSE = """
Write the run's best model (paths.run) to paths.export: model.safetensors, config.json
(architecture, input, names of objects and attributes, training, digests), README.md (a model card)
and, with --export.onnx true, model.onnx. Thresholds come from the evaluation of the validation
split (data.validation_split), the card's results from that of evaluation.split: run
`vlal evaluate` on both first. A repeated export replaces the earlier one.
"""


def work(config: Config, flags: Mapping[str, str]) -> Counts:
    """Gather, check, write; returns the closing counts."""
    if config.export.onnx:
        require_onnx()
    dataset = open_dataset(config.paths.dataset, cache=Path(config.paths.cache))
    run = open_store(config.paths.run)
    network, model = load_saved_model(run, "best", vocabulary=dataset.vocabulary)
    files, remarks, difference = {WEIGHTS: encode_weights(network)}, {}, None

    split = config.data.validation_split
    thresholds: Thresholds | str
    validation = _result(run, split, model, dataset.digest)
    if isinstance(validation, str):
        thresholds = validation
        remark(logger, "export.thresholds", "no thresholds are exported: %s", validation)
    else:
        key = f"{evaluation_folder(split, 'model')}/predictions.safetensors"
        thresholds = learn_thresholds(
            as_counted(load_predictions(run, key), unannotated_of(validation)),
            dataset.vocabulary.attributes,
            split=split,
            min_annotated=config.export.min_annotated,
        )
    if isinstance(thresholds, Thresholds):
        files[THRESHOLDS] = encode_thresholds(thresholds)

    if config.export.onnx:
        files[ONNX], difference = export_onnx(network, model)
        remarks = {"onnx": {"largest_difference": difference}}

    info = ExportInfo(
        model=model,
        vocabulary=dataset.vocabulary,
        dataset=dataset.name,
        box_expansion=float(dataset.manifest["crops"].get("box_expansion", 0.0)),
        background=str(dataset.manifest["crops"].get("background", WHITE)),
    )
    result = _result(run, config.evaluation.split, model, dataset.digest)
    if isinstance(result, str):
        remark(logger, "export.results", "the model card has no results: %s", result)
    card = model_card(info, result=result, thresholds=thresholds, onnx_difference=difference)
    write_export(open_store(config.paths.export), info, files, card=card, remarks=remarks)
    return {
        "model": config.paths.export,
        "objects": model.num_objects,
        "attributes": model.num_attributes,
        "validation_mAP": model.validation_map,
        "thresholds": thresholds if isinstance(thresholds, str) else thresholds.describe(),
        **({} if difference is None else {"onnx_difference": difference}),
    }


def _result(
    run: Store, split: str, model: SavedModelInfo, dataset_digest: str
) -> dict[str, Any] | str:
    """`result.json` of the model on a split, or the reason why it cannot be used."""
    folder = evaluation_folder(split, "model")
    remedy = f"run vlal evaluate --evaluation.split {split}, and vlal export again"
    try:
        data = run.read(f"{folder}/result.json")
    except NotFoundError:
        return f"the model was not evaluated on {split}; {remedy}"
    result = read_result(data, where=f"{run.url}: {folder}/result.json", remedy=remedy)
    if (result["model"], result["dataset"]["digest"]) != (model.to_json(), dataset_digest):
        return f"{folder} is of another model or dataset than the present one; {remedy}"
    return result


PROGRAM = Program(
    name="export",
    usage="vlal export",
    purpose=PURPOSE,
    sections=("paths", "export", "data", "evaluation", "observability"),
    # Not the export itself: it is handed on, and a configuration names folders of this machine.
    output=lambda config, flags: config.paths.run,
    writes=lambda config, flags: ((config.paths.export, ""), (config.paths.run, "export")),
    work=work,
    inputs=export_inputs,
)


if __name__ == "__main__":
    sys.exit(run_program(PROGRAM, sys.argv[1:]))
