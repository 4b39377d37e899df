"""Which attributes the selective loss left out, and how often: Fig. 3 drawn again on the data.

The trainer logs only how many pairs it ignored per crop. The draw is a function of seed, uid and
visit alone, so that it can be repeated here without a model, bit for bit.

Shapes: N crops, A attributes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlal_dist.evaluation.training_crops import TrainingCrops
from vlal_dist.method.ignore_set import sample_ignore_set

SHOWN = 15


@dataclass(frozen=True)
class IgnoredAttribute:
    """How often one attribute was ignored.

    Attributes:
        name: attribute.
        kind: its type.
        crops: crops in which it is feasible and unannotated.
        ignored: those of them in which it was drawn.
        uniform: share that a draw with equal weights would ignore, expected.
    """

    name: str
    kind: str
    crops: int
    ignored: int
    uniform: float

    @property
    def share(self) -> float:
        """Share of the crops, of 1."""
        return self.ignored / self.crops


@dataclass(frozen=True)
class IgnoredSection:
    """What the page says of it.

    Attributes:
        counted: what was counted, in words.
        summary: over all attributes, in words.
        attributes: the most ignored, highest share first.
    """

    counted: str
    summary: str
    attributes: list[IgnoredAttribute]


def why_no_draw(method: Mapping[str, Any]) -> str:
    """Why there is nothing to draw again; empty: there is.

    Args:
        method: the section of the run's resolved configuration.
    """
    if method["loss"] != "selective":
        return f"method.loss {method['loss']} draws no ignore sets."
    draw, weights = method.get("draw", "random"), method.get("draw_weights", "likelihood")
    if (draw, weights) != ("random", "likelihood"):
        return (
            f"Only random draws weighted by the likelihood are counted here; this run has "
            f"method.draw {draw} and method.draw_weights {weights}."
        )
    if method["num_ignore"] in (0, "all"):
        return (
            f"method.num_ignore {method['num_ignore']}: each feasible attribute is treated alike."
        )
    return ""


def count_ignored(
    crops: TrainingCrops,
    *,
    names: Sequence[str],
    kinds: Sequence[str],
    num_ignore: int,
    draw_over: str,
    seed: int,
) -> IgnoredSection:
    """Draw Omega_Ignore of each crop's visit 0 and count it by attribute (Fig. 3).

    Args:
        crops: of the run's training split.
        names, kinds: of the attributes and their types, [A].
        num_ignore: NUM_IGNORE.
        draw_over: `feasible` or `unannotated` (feasible ones).
        seed: of the run.
    """
    open_pairs = crops.feasible & (crops.label == 0)
    drawable = open_pairs if draw_over == "unannotated" else crops.feasible
    drawn = sample_ignore_set(
        inverse_weight=torch.from_numpy(crops.inverse_weight),
        drawable=torch.from_numpy(drawable),
        num_ignore=num_ignore,
        uid=torch.from_numpy(crops.uid.view(np.int64)),
        visit=torch.zeros(len(crops.uid), dtype=torch.int64),
        seed=seed,
    ).numpy()
    ignored = drawn & open_pairs
    size = drawable.sum(axis=1)
    chance = np.minimum(1.0, num_ignore / np.maximum(size, 1))
    least = max(1, len(crops.uid) // 100)
    count = open_pairs.sum(axis=0)
    found = [
        IgnoredAttribute(
            name=names[a],
            kind=kinds[a],
            crops=int(count[a]),
            ignored=int(ignored[:, a].sum()),
            uniform=float(chance[open_pairs[:, a]].mean()),
        )
        for a in np.flatnonzero(count >= least).tolist()
    ]
    found.sort(key=lambda one: (-one.share, -one.crops, one.name))
    return IgnoredSection(
        counted=(
            f"Drawn again for the first {len(crops.uid):,} of {crops.of:,} crops of split "
            f"{crops.split} of {crops.dataset}, in index order, each at its first visit, with the "
            f"run's NUM_IGNORE {num_ignore}, method.draw_over {draw_over} and seed {seed}. "
            f"Attributes that are feasible and unannotated in fewer than {least} of these crops "
            "are not listed."
        ),
        summary=_summary(int(open_pairs.sum()), int(ignored.sum()), size, num_ignore),
        attributes=found[:SHOWN],
    )


def _summary(pairs: int, ignored: int, size: npt.NDArray[np.int64], num_ignore: int) -> str:
    """Over all attributes; `size` is that of each crop's drawing set."""
    crops = max(1, len(size))
    small = 100 * float((size <= num_ignore).sum()) / crops
    return (
        f"{ignored:,} of {pairs:,} feasible unannotated pairs were ignored "
        f"({100 * ignored / max(1, pairs):.1f} %, {ignored / crops:.1f} per crop); the others "
        f"counted as weak negatives. In {small:.1f} % of the crops the drawing set has "
        f"{num_ignore} members or fewer, and nothing was left to chance."
    )
