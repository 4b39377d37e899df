"""Model card of an export: use, training, results, thresholds, limits."""

import re
from typing import Any

from vlal_dist.evaluation.results import headline_metrics, percent, protocol_note, unannotated_of
from vlal_dist.release.model import ONNX, THRESHOLDS, ExportInfo
from vlal_dist.release.thresholds import Thresholds


def model_card(
    info: ExportInfo,
    *,
    result: dict[str, Any] | str,
    thresholds: Thresholds | str,
    onnx_difference: float | None,
) -> str:
    """The text of `README.md`.

    Args:
        info: the model.
        result: `result.json` of the test split, or the reason why there is none.
        thresholds: as learned, or the reason why there are none.
        onnx_difference: between `model.onnx` and torch; None: there is no such file.
    """
    model, vocabulary, gated = info.model, info.vocabulary, info.model.layers.object_gate
    dataset = _plain(info.dataset)
    onnx = ""
    if onnx_difference is not None:
        onnx = f"""
## ONNX

`{ONNX}`: `image` float32 [B, 3, S, S], RGB in [0, 1], and `object_id` int64 [B] to `probability` \
float32 [B, A]; over random inputs onnxruntime and torch differed by at most {onnx_difference:.1e}
"""
    return f"""\
---
library_name: vlal-dist
pipeline_tag: image-classification
---

# Visual attributes of {dataset}

A {model.layers.backbone}, \
{"gated by" if gated else "without"} the object's name: the probabilities of \
{len(vocabulary.attributes):,} attributes of one object in a photo\
{f", for {len(vocabulary.objects):,} kinds of objects" if gated else ""}.

## Use

    import vlal_dist as vlal
    model = vlal.load_model('FOLDER')    # where this file lies, also s3://
    model('photo.jpg'{f", {_plain(vocabulary.objects[0])!r}" if gated else ""}, top_k=5)

An image of Pillow, a path, or a uint8 tensor [3, H, W]; `box=(x, y, w, h)` where the object is a \
part of the photo. For many: `vlal predict --predict.model FOLDER --predict.images \
PHOTOS{" --predict.object NAME" if gated else ""}`.

Input: the crop of the object's box, margin {info.box_expansion:g} of its shorter side, squashed \
to {model.image_size}x{model.image_size} (bilinear, antialiased), RGB, \
transparent pixels on {info.background}, \
{"normalised with ImageNet's mean and deviation" if model.normalize else "not normalised"}.

## Training

Loss `{_plain(model.loss)}`, profile `{_plain(model.profile)}`, seed {model.seed}; weights of step \
{model.step:,} (epoch {model.epoch}), chosen by validation mAP {percent(model.validation_map)} %. \
Dataset `{dataset}`, vocabulary `{vocabulary.digest[:16]}`, feasible sets \
`{model.feasible_digest[:16]}`.

## Results

{_results(result)}

## Thresholds

{_thresholds(thresholds)}
{onnx}
## Limits

- Trained on partial labels: most attributes of most crops were never annotated. A probability \
ranks well before it is a frequency.
{_counted(result)}{_DETECTION if gated else ""}\
- It knows photos like those it was trained on; on others nothing was measured.
"""


_DETECTION = """\
- The model does not detect objects: you name the object, and a wrong name gives confident nonsense.
"""


def _counted(result: dict[str, Any] | str) -> str:
    if not isinstance(result, str) and protocol_note(unannotated_of(result)):
        return (
            "- In the metrics unannotated pairs count as negative: an attribute that is present "
            "but was not listed counts as a mistake.\n"
        )
    return (
        "- Metrics and thresholds count annotated pairs only. Over all attributes of a crop, "
        "unlikely ones included, precision is lower.\n"
    )


def _results(result: dict[str, Any] | str) -> str:
    if isinstance(result, str):
        return f"None: {result}."
    note = protocol_note(unannotated_of(result))
    table = "".join(
        f"| {_plain(group['name'])} | {group['num_classes']} of {group['num_attributes']} "
        f"| {percent(group['mAP'])} |\n"
        for group in result["groups"]
    )
    overall = result["groups"][0]
    vaw = ", ".join(
        f"{name} {percent(overall[name])}" for name in headline_metrics(result["settings"]["top_k"])
    )
    return (
        f"Split `{_plain(result['split'])}`, {result['num_samples']:,} crops; attributes with a "
        f"positive and a negative count{f'; {note}' if note else ''}.\n\n"
        f"| group | attributes counted | mAP, % |\n|---|---|---|\n{table}"
        f"\nBy the VAW evaluator: {vaw}."
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


def _plain(text: str) -> str:
    """A name without what Markdown or HTML would take for markup."""
    return re.sub(r"[^\w .,:;+/()'&-]", "_", text)
