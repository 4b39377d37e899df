"""The model card of an export: what it is, from what, how good, its limits, how to load it."""

import re
from typing import Any

from vlal_dist.evaluation.results import headline_metrics, percent
from vlal_dist.release.model import ONNX, THRESHOLDS, ExportInfo
from vlal_dist.release.thresholds import Thresholds


def model_card(
    info: ExportInfo,
    *,
    result: dict[str, Any] | str,
    thresholds: Thresholds | str,
    onnx: str | None,
) -> str:
    """The text of `README.md`.

    Args:
        info: the model.
        result: `result.json` of the test split, or the reason why there is none.
        thresholds: as learned, or the reason why there are none.
        onnx: what the check of `model.onnx` found; None: not asked for.
    """
    model, vocabulary = info.model, info.vocabulary
    gate = "gated by the object's name" if model.object_gate else "without the object's name"
    width = "" if model.width == 64 else f" of width {model.width}"
    norm = "normalised with ImageNet's mean and deviation" if model.normalize else "not normalised"
    example = vocabulary.objects[0] if model.object_gate else None
    sections = [
        "---\nlibrary_name: vlal-dist\npipeline_tag: image-classification\n---",
        f"# Visual attributes of {_plain(info.dataset)}",
        f"A ResNet-{model.depth}{width}, {gate}: the probabilities of "
        f"{len(vocabulary.attributes):,} attributes of one object in a photo"
        + (f", for {len(vocabulary.objects):,} kinds of objects." if model.object_gate else "."),
        "## Use",
        "    from vlal_dist.release.model import load_exported\n"
        "    model = load_exported('FOLDER')    # where this file lies, also s3://\n"
        f"    model('photo.jpg'{_argument(example)}, top_k=5)",
        "An image of Pillow, a path, or a uint8 tensor [3, H, W]; `box=(x, y, w, h)` where the "
        "object is a part of the photo. For many: `python -m vlal_dist.predict --predict.model "
        f"FOLDER --predict.images PHOTOS{' --predict.object NAME' if model.object_gate else ''}`.",
        f"Input: the crop of the object's box, margin {info.box_expansion:g} of its shorter side, "
        f"squashed to {model.image_size}x{model.image_size} (bilinear, antialiased), RGB, {norm}.",
        "## Training",
        f"Loss `{_plain(model.loss)}`, profile `{_plain(model.profile)}`, seed {model.seed}; "
        f"weights of step {model.step:,} (epoch {model.epoch}), chosen by validation mAP "
        f"{percent(model.validation_map)} %. Dataset `{_plain(info.dataset)}`, vocabulary "
        f"`{vocabulary.digest[:16]}`, feasible sets `{model.feasible_digest[:16]}`.",
        "## Results",
        _results(result),
        "## Thresholds",
        _thresholds(thresholds),
        *([f"## ONNX\n\n`{ONNX}`: {onnx}"] if onnx is not None else []),
        "## Limits",
        "- Trained on partial labels: most attributes of most crops were never annotated. A "
        "probability ranks well before it is a frequency.\n"
        "- Metrics and thresholds count annotated pairs only. Over all attributes of a crop, "
        "unlikely ones included, precision is lower.\n"
        + (
            "- Each object must be one of the model's, and the object must be known: nothing is "
            "detected here.\n"
            if model.object_gate
            else ""
        )
        + "- It knows photos like those it was trained on; on others nothing was measured.",
    ]
    return "\n\n".join(sections) + "\n"


def _results(result: dict[str, Any] | str) -> str:
    if isinstance(result, str):
        return f"None: {result}."
    lines = ["| group | attributes counted | mAP, % |", "|---|---|---|"]
    lines += [
        f"| {_plain(group['name'])} | {group['num_classes']} of {group['num_attributes']} "
        f"| {percent(group['mAP'])} |"
        for group in result["groups"]
    ]
    overall = result["groups"][0]
    vaw = ", ".join(
        f"{name} {percent(overall[name])}" for name in headline_metrics(result["settings"]["top_k"])
    )
    return (
        f"Split `{_plain(result['split'])}`, {result['num_samples']:,} crops; attributes with a "
        "positive and a negative count.\n\n"
        + "\n".join(lines)
        + f"\n\nBy the VAW evaluator: {vaw}."
    )


def _thresholds(thresholds: Thresholds | str) -> str:
    if isinstance(thresholds, str):
        return f"None: {thresholds}."
    return (
        f"`{THRESHOLDS}`: for each attribute the probability from which on it is called present, "
        f"chosen for the best F1 on `{_plain(thresholds.split)}` over its annotated crops: "
        f"{thresholds.describe()}. An own threshold needs {thresholds.min_annotated} positives and "
        "as many negatives there."
    )


def _argument(name: str | None) -> str:
    return "" if name is None else f", {_plain(name)!r}"


def _plain(text: str) -> str:
    """A name without what Markdown or HTML would take for markup."""
    return re.sub(r"[^\w .,:;+/()'&-]", "_", text)
