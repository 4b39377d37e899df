"""Draws of the compiled operator in bulk, and the statistics that judge them.

scipy is no declared dependency, so the distribution function is torch's.
"""

import numpy as np
import torch

from tests.kernels.cases import FUSED, PAPER, indptr

LOW, HIGH = 1e-4, 1 - 1e-4
"""Between these lies the p-value of a law that is right; too good a fit is wrong as well."""
REFUSED = 1e-12
"""Below this lies that of every wrong law."""


def chi_square_p(statistic: float, freedom: int) -> float:
    """P(chi-square of that many degrees of freedom > statistic)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def drawn_ids(weight, k, *, uid, visit, seed=7, inverse=None):
    """The attributes drawn in each row, int64 [B, k], ascending; all rows have these weights.

    In parts, for the sake of memory; `inverse` in place of max(weight) / weight.
    """
    weight = np.asarray(weight, dtype=np.float64)
    size, found = len(weight), []
    one = torch.from_numpy(weight.max() / weight if inverse is None else inverse).float()
    for part in range(0, len(uid), 1 << 18):
        rows = len(uid[part : part + (1 << 18)])
        out = torch.full((rows, k), -1, dtype=torch.int32)
        given = {
            "logits": torch.zeros(rows, size, dtype=torch.bfloat16),
            "label": torch.zeros(rows, size, dtype=torch.int8),
            "object_id": torch.zeros(rows, dtype=torch.int64),
            "feasible_indptr": indptr([size]),
            "feasible_index": torch.arange(size, dtype=torch.int32),
            "weight_indptr": torch.arange(rows + 1) * size,
            "inverse_weight": one.repeat(rows),
            "uid": uid[part : part + rows].contiguous(),
            "visit": visit[part : part + rows].contiguous(),
            "seed": torch.tensor([seed]),
            "drawn_out": out,
        }
        settings = {"mode": "draw", "num_ignore": k, "over_unannotated": False, "margin": 0.0}
        FUSED[0].run(given, gammas=PAPER, detach_focal=False, **settings)
        found.append(out.long())
    return torch.cat(found)


def indicators(ids, size):
    """float64 [B, A]: 1 where drawn."""
    return torch.zeros(len(ids), size, dtype=torch.float64).scatter_(1, ids, 1.0)


def axis(name: str, rows: int) -> dict[str, torch.Tensor]:
    """Uids and visits of rows that differ in the uid, in the visit, or in both."""
    number = torch.arange(rows)
    return {
        "uid": {"uid": number, "visit": torch.zeros_like(number)},
        "visit": {"uid": torch.full_like(number, -(2**40)), "visit": number},
        "both": {"uid": (number % 1000) << 32, "visit": number // 1000},
    }[name]
