import itertools
import json

import numpy as np
import pytest
import torch

from vlal_dist.config.sections import TrainingConfig
from vlal_dist.training.schedule import Schedule

RATES = {"base_decay": 1e-5, "fast_decay": 7e-4}


def schedule(kind: str, **changes: float) -> Schedule:
    return Schedule(TrainingConfig(schedule=kind, **changes), RATES)  # type: ignore[arg-type]


@pytest.mark.parametrize("patience", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_plateau_equals_torchs(patience: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 6, 40) / 10
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in RATES]
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": lr} for p, lr in zip(parameters, RATES.values(), strict=True)]
    )
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.1, patience=patience, threshold=0.0
    )
    ours = schedule("plateau", plateau_patience=patience)
    for score in scores.tolist():
        oracle.step(score)
        ours.observe(score)
        expected = [group["lr"] for group in optimizer.param_groups]
        assert list(ours.rates_at(0).values()) == expected
        restored = schedule("plateau", plateau_patience=patience)
        restored.restore(json.loads(json.dumps(ours.state())))
        ours = restored
    assert ours.rates_at(0) != RATES


def test_cosine_falls_from_the_base_rate_to_zero() -> None:
    ours = schedule("cosine")
    shares = [ours.rates_at(step / 10)["fast_decay"] / 7e-4 for step in range(12)]
    assert shares[0] == 1 and shares[5] == pytest.approx(0.5) and shares[10] == shares[11] == 0
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares))


def test_constant_takes_a_changed_rate_at_a_resume() -> None:
    ours = schedule("constant")
    for _ in range(10):
        ours.observe(0.1)
    assert ours.rates_at(0.7) == RATES
    changed = Schedule(TrainingConfig(schedule="constant"), {"fast_decay": 1.0})
    changed.restore(ours.state())
    assert changed.rates_at(0) == {"fast_decay": 1.0}
