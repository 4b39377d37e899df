"""Results of an evaluation: result.json, attributes.parquet and the printed row.

Shares are of 1 in the files and percent in print. Sec. 3.1; Table 1.
"""

import contextlib
import io
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
from typing_extensions import TypedDict

from vlal_dist.config.sections import EvaluationConfig, evaluation_folder
from vlal_dist.contents import AtLeastOne, Count, Finite, parse_json
from vlal_dist.data.format.dataset import Dataset
from vlal_dist.data.format.index import decode_table
from vlal_dist.errors import NotFoundError
from vlal_dist.evaluation.dense_labels import DenseLabels
from vlal_dist.evaluation.predictions import Predictions
from vlal_dist.method.metrics import AttributeScores, Evaluation, evaluate
from vlal_dist.storage.store import Store
from vlal_dist.vocabulary import Vocabulary

FORMAT = 1
TRAINED_ON = "trained_on.json"
"""File of a run's root: `digests` of the dataset that is its own, written by train."""
_NAMES = {"constant": "constant 0.5", "clip": "CLIP, zero-shot"}
ROW_CELLS = 15  # columns of the printed row before it is folded: VAW's groups fit on one line
ATTRIBUTES_SCHEMA = pa.schema(
    [
        ("attribute", pa.string()),
        ("type", pa.string()),
        ("prevalence", pa.string()),
        ("num_positive", pa.int64()),
        ("num_negative", pa.int64()),
        ("num_unannotated", pa.int64()),
        ("ap", pa.float64()),  # null without a positive or without a negative
        ("mean_score", pa.float64()),
    ]
)


class _Figures(TypedDict):
    name: str
    mAP: Finite | None
    num_classes: Count


class _Group(_Figures):
    num_attributes: Count
    num_classes_vaw: Count
    mA: Finite | None


class _DatasetEntry(TypedDict):
    name: str
    digest: str
    vocabulary_digest: str
    feasible_digest: str


class _Settings(TypedDict):
    top_k: Count
    threshold: Finite
    unannotated: NotRequired[Literal["excluded", "negative"]]


class _Truth(TypedDict):
    groups: Annotated[list[_Figures], AtLeastOne]
    unknown_names: list[str]


class _Model(TypedDict):
    step: Count
    epoch: Count
    validation_map: Finite | None


class _Result(TypedDict):
    """result.json, as `build_result` describes it."""

    name: str
    predictor: str
    split: str
    dataset: _DatasetEntry
    model: _Model | None
    num_samples: Count
    num_positive: Count
    num_negative: Count
    settings: _Settings
    groups: Annotated[list[_Group], AtLeastOne]
    excluded: list[str]
    truth: _Truth | None


def read_result(data: bytes, *, where: str, remedy: str = "evaluate again") -> dict[str, Any]:
    """Parse result.json; a DataError, naming `where`, unless it is one of this version."""
    return parse_json(data, _Result, where=where, remedy=remedy)  # type: ignore[no-any-return]


def build_result(
    config: EvaluationConfig,
    dataset: Dataset,
    predictions: Predictions,
    evaluation: Evaluation,
    *,
    model: Mapping[str, Any] | None,
    dense: DenseLabels | None,
) -> dict[str, Any]:
    """The content of result.json.

    Args:
        config: split, predictor, top_k, threshold, and what unannotated pairs count as.
        dataset: the dataset of the split.
        predictions: of all rows of the split, in order.
        evaluation: `evaluate` of the predictions.
        model: `model.json` of the model behind them; None for constant and clip.
        dense: dense labels, if known: adds `truth`, the mAP on them.

    Returns:
        `format`, `name`, `predictor`, `split`, `dataset` (name and digests), `model`,
        `num_samples`, `num_positive`, `num_negative`, `settings`, `groups` (a list in the order
        of Table 1: name, num_attributes and the keys of `Evaluation.groups`), `excluded` (names
        of attributes outside `mAP`), `truth` (null, or `groups` and `unknown_names`).
    """
    groups = dataset.vocabulary.groups()
    names = dataset.vocabulary.attributes
    truth = None
    if dense is not None:
        found = evaluate(predictions.score, dense.label, groups=groups).groups
        truth = {
            "groups": [
                {"name": name, **{key: found[name][key] for key in ("mAP", "num_classes")}}
                for name in groups
            ],
            "unknown_names": dense.unknown_names,
        }
    return {
        "format": FORMAT,
        "name": f"{model['loss']} ({model['profile']})" if model else _NAMES[config.predictor],
        "predictor": config.predictor,
        "split": config.split,
        "dataset": {
            "name": dataset.name,
            "digest": dataset.digest,
            "vocabulary_digest": dataset.vocabulary.digest,
            "feasible_digest": dataset.feasible.digest,
        },
        "model": None if model is None else dict(model),
        "num_samples": len(predictions.row),
        "num_positive": int(evaluation.attributes.num_positive.sum()),
        "num_negative": int(evaluation.attributes.num_negative.sum()),
        "settings": {
            "top_k": config.top_k,
            "threshold": config.threshold,
            "unannotated": config.unannotated,
        },
        "groups": [
            {"name": name, "num_attributes": len(ids), **evaluation.groups[name]}
            for name, ids in groups.items()
        ],
        "excluded": [names[i] for i in np.flatnonzero(~evaluation.attributes.defined)],
        "truth": truth,
    }


def encode_attributes(
    attributes: AttributeScores, score: npt.NDArray[np.float32], vocabulary: Vocabulary
) -> bytes:
    """`attributes.parquet`: a row per attribute; `mean_score` over all rows (PSL's prior)."""
    columns = {
        "attribute": vocabulary.attributes,
        "type": vocabulary.attribute_type,
        "prevalence": vocabulary.prevalence,
        "num_positive": attributes.num_positive,
        "num_negative": attributes.num_negative,
        "num_unannotated": attributes.num_unannotated,
        "ap": pa.array(attributes.ap, mask=~attributes.defined),
        "mean_score": score.mean(axis=0, dtype=np.float64),
    }
    sink = io.BytesIO()
    pa.parquet.write_table(pa.table(columns, schema=ATTRIBUTES_SCHEMA), sink)
    return sink.getvalue()


def read_attributes(store: Store, folder: str) -> list[dict[str, Any]]:
    """The rows of an evaluation's `attributes.parquet`, compared with a constant score.

    Returns:
        The columns, and `baseline`, the share of positives among the annotated rows (None without
        any), and `lift`, AP / baseline (None where the AP is undefined).

    Raises:
        NotFoundError, DataError: absent; damaged.
    """
    key = f"{folder}/attributes.parquet"
    table = decode_table(
        store.read(key),
        ATTRIBUTES_SCHEMA,
        where=f"{store.url}: {key}",
        optional=("ap",),
        remedy="evaluate again",
    )
    lines: list[dict[str, Any]] = table.to_pylist()
    for line in lines:
        labelled = line["num_positive"] + line["num_negative"]
        line["baseline"] = line["num_positive"] / labelled if labelled else None
        line["lift"] = None if line["ap"] is None else line["ap"] / line["baseline"]
    return lines


def headline_metrics(top_k: int) -> tuple[str, str, str, str]:
    """Keys of the VAW evaluator's metrics in a group of a result."""
    return ("mAP_vaw", "mA", f"mR@{top_k}", f"F1@{top_k}")


def unannotated_of(result: Mapping[str, Any]) -> str:
    """What unannotated pairs count as in a result; `excluded` in those of older versions."""
    return str(result.get("settings", {}).get("unannotated", "excluded"))


def protocol_note(unannotated: str) -> str:
    """What every figure says of unannotated pairs; empty for the protocol of Sec. 3.1."""
    return "unannotated pairs count as negative" if unannotated == "negative" else ""


def find_folder(store: Store, dataset: Dataset, *, split: str, predictor: str) -> str:
    """Where an evaluation belongs below the run's root.

    The run's own dataset is what it was trained on, or what `paths.dataset` named then
    (`trained_on.json`). Where training left no such record, it is that of an evaluation that is
    there. Results of another dataset stand beside it, under its name and digest.

    Args:
        store: the run root.
        dataset: that is evaluated.
        split, predictor: of `EvaluationConfig`.
    """
    own, remedy = evaluation_folder(split, predictor), "repeat the training command"
    digests = [dataset.digest]
    with contextlib.suppress(NotFoundError):
        data, where = store.read(f"{own}/result.json"), f"{store.url}: {own}/result.json"
        digests = [read_result(data, where=where)["dataset"]["digest"]]
    with contextlib.suppress(NotFoundError):
        data, where = store.read(TRAINED_ON), f"{store.url}: {TRAINED_ON}"
        digests = parse_json(data, dict[str, list[str]], where=where, remedy=remedy)["digests"]
    if dataset.digest in digests:
        return own
    readable = re.sub(r"[^\w.-]+", "-", dataset.name)[:60]
    return evaluation_folder(split, predictor, other=f"{readable}-{dataset.digest[:8]}")


def percent(value: float | None) -> str:
    """A share of 1 as percent; `-` where it is not defined (None, or VAW's -1)."""
    return "-" if value is None or value < 0 else f"{100 * value:.2f}"


def format_row(result: dict[str, Any]) -> str:
    """Aligned lines: groups, how many of their attributes count, mAP in percent.

    The VAW evaluator's overall metrics, over all attributes, close the row.
    """
    cells = [
        (group["name"], f"{group['num_classes']}/{group['num_attributes']}", percent(group["mAP"]))
        for group in result["groups"]
    ]
    overall = result["groups"][0]
    cells += [
        (name, str(overall["num_classes_vaw"]), percent(overall[name]))
        for name in headline_metrics(result["settings"]["top_k"])
    ]
    if result["truth"] is not None:
        whole = result["truth"]["groups"][0]
        cells.append(("mAP_complete", str(whole["num_classes"]), percent(whole["mAP"])))
    note = protocol_note(unannotated_of(result))
    lines = [f"{result['name']} on {result['dataset']['name']}, {result['split']}"]
    lines[0] += f"; {note}" if note else ""
    for start in range(0, len(cells), ROW_CELLS):
        block = cells[start : start + ROW_CELLS]
        widths = [max(map(len, cell)) for cell in block]
        for head, *texts in zip(("mAP, %", "attributes", ""), *block, strict=True):
            aligned = [text.rjust(width) for text, width in zip(texts, widths, strict=True)]
            lines.append("  ".join([f"{head:<10}", *aligned]))
    return "\n".join(lines)
