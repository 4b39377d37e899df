"""What is minimised: a row of Table 1, its choice of ignored pairs, and the scale of the sum.

The objective is (reference_batch / B) x the sum over the global batch of the sum over attributes,
B the configured batch also where the last one is shorter: at B = 64 the authors' plain sum.

Shapes: B rows of a micro-batch, N rows of the global batch, A attributes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlal_dist.data.batch import Batch
from vlal_dist.errors import ConfigError
from vlal_dist.method.baselines import LossSettings, fixed_ignored, psl_ignored
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.training.ranks import Ranks


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        loss: gammas and treatment of unannotated pairs (a row of Table 1).
        margin, detach_focal: as `selective_loss` takes them.
        num_ignore: NUM_IGNORE; None: all of the drawing set.
        draw_over: `feasible` or `unannotated` (feasible ones).
        seed: of the draws.
        batch_size: B, rows of the configured global batch.
        reference_batch: B at which the objective is the authors' plain sum.
        psl_prior: floating [A], for PSL.
        psl_threshold, psl_top_k: as `psl_ignored` takes them.
    """

    loss: LossSettings
    margin: float
    detach_focal: bool
    num_ignore: int | None
    draw_over: str
    seed: int
    batch_size: int
    reference_batch: int
    psl_prior: Tensor | None = None
    psl_threshold: float = 0.5
    psl_top_k: int = 5

    @property
    def scale(self) -> float:
        """Factor of the sum over rows."""
        return self.reference_batch / self.batch_size


def choose_ignored(
    objective: Objective,
    logits: Tensor,
    batch: Batch,
    *,
    index: npt.NDArray[np.int64],
    ranks: Ranks,
) -> Tensor:
    """Omega_Ignore: drawn by likelihood (Fig. 3), or as the baseline of Table 1 says.

    Args:
        objective: which.
        logits: [B, A]; only PSL looks at them.
        batch: the micro-batch.
        index: position within the epoch of each real row; none for a dummy row.
        ranks: PSL chooses over the batches of all of them, so that all must call.

    Returns:
        bool [B, A], for `assign_terms`.
    """
    unannotated = batch.label == 0
    treatment = objective.loss.unannotated
    if treatment == "psl":
        return _choose_psl(objective, logits, unannotated, index, ranks)
    if treatment != "select":
        return fixed_ignored(unannotated, treatment=treatment)
    drawable = batch.feasible
    if objective.draw_over == "unannotated":
        drawable = drawable & unannotated
    weight = batch.inverse_weight
    return sample_ignore_set(
        inverse_weight=torch.zeros_like(logits) if weight is None else weight,
        drawable=drawable,
        num_ignore=objective.num_ignore,
        uid=batch.uid,
        visit=batch.visit,
        seed=objective.seed,
    )


def check_psl(objective: Objective, micro_batches: int) -> None:
    """Refuse what PSL cannot do.

    Raises:
        ConfigError: no prior, or more than one micro-batch per rank and step.
    """
    if objective.psl_prior is None:
        raise ConfigError(
            "method.loss psl needs method.psl_prior: the attributes.parquet that "
            "`evaluate --evaluation.split train` writes for the CE-ignoring model of this seed"
        )
    if micro_batches > 1:
        raise ConfigError(
            f"method.loss psl chooses over the whole batch, but each rank runs {micro_batches} "
            "micro-batches per step; set training.accumulation 1, and resume with as many ranks "
            "as at the first start"
        )


def _choose_psl(
    objective: Objective,
    logits: Tensor,
    unannotated: Tensor,
    index: npt.NDArray[np.int64],
    ranks: Ranks,
) -> Tensor:
    """PSL's pairs: rows of all ranks are laid in the epoch's order, so that W changes nothing."""
    assert objective.psl_prior is not None
    rows = len(index)  # 0 for a dummy row, which is not sent
    own = torch.as_tensor(index, device=logits.device)
    probability = torch.sigmoid(logits.detach().float())[:rows]
    position = torch.cat(ranks.gather(own))
    order = position.argsort()
    chosen = psl_ignored(
        probability=torch.cat(ranks.gather(probability))[order],
        unannotated=torch.cat(ranks.gather(unannotated[:rows].to(torch.uint8)))[order].bool(),
        prior=objective.psl_prior.to(logits.device),
        threshold=objective.psl_threshold,
        top_k=objective.psl_top_k,
        margin=objective.margin,
    )
    ignored = torch.zeros_like(unannotated)
    ignored[:rows] = chosen[torch.searchsorted(position[order], own)]
    return ignored
