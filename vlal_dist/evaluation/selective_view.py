"""The two sections of the page about the selective loss, or why they are left out."""

from collections.abc import Callable, Mapping
from typing import Any

from vlal_dist.data.dataset import Dataset
from vlal_dist.errors import VlalError
from vlal_dist.evaluation.calibration import CalibrationSection, draw_calibration
from vlal_dist.evaluation.ignored import IgnoredSection, count_ignored, why_no_draw
from vlal_dist.evaluation.training_crops import read_training_crops, why_no_crops


def selective_sections(
    run_config: Mapping[str, Any],
    result: Mapping[str, Any],
    open_merged: Callable[[], Dataset],
) -> tuple[IgnoredSection | str, CalibrationSection | str]:
    """What was ignored, and likelihood against annotation; a sentence where there is no section.

    A page is worth having without them: nothing that lacks or does not fit is an error here.

    Args:
        run_config: the run's resolved configuration; empty without training.
        result: `result.json`.
        open_merged: opens the merged dataset in `paths.merged`.
    """
    if not run_config:
        reason = "This run holds no config.yaml: nothing was trained here."
        return reason, reason
    try:
        return _sections(run_config, result, open_merged)
    except VlalError as error:
        reason = f"The merged dataset cannot be read: {error}"
    except KeyError as error:
        reason = f"The run's config.yaml is of another version and lacks {error}."
    return reason, reason


def _sections(
    run_config: Mapping[str, Any], result: Mapping[str, Any], open_merged: Callable[[], Dataset]
) -> tuple[IgnoredSection | str, CalibrationSection | str]:
    method = run_config["method"]
    no_draw = why_no_draw(method)
    if method["loss"] != "selective":
        return no_draw, f"method.loss {method['loss']} uses no likelihoods."
    merged = open_merged()
    reason = why_no_crops(run_config, merged.manifest, result)
    if reason:
        return reason, reason
    crops = read_training_crops(
        merged,
        run_config["data"]["train_split"],
        temperature=run_config["scoring"]["temperature"],
    )
    calibration = draw_calibration(crops)
    if no_draw:
        return no_draw, calibration
    return (
        count_ignored(
            crops,
            names=merged.vocabulary.attributes,
            kinds=merged.vocabulary.attribute_type,
            num_ignore=method["num_ignore"],
            draw_over=method["draw_over"],
            seed=run_config["training"]["seed"],
        ),
        calibration,
    )
