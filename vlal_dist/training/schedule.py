"""Learning rates over a run: plateau on validation mAP (the authors'), cosine, or constant.

Independent of any optimizer. The whole state is a dict of plain values for the checkpoint.
"""

import math
from collections.abc import Mapping
from typing import Any

from vlal_dist.config.sections import TrainingConfig

SMALLEST_CUT = 1e-8  # a cut below this is not made, as in torch's ReduceLROnPlateau


class Schedule:
    """Learning rates of the parameter groups at each step.

    `plateau` equals torch's ReduceLROnPlateau(mode="max", threshold=0): after more than
    `plateau_patience` validations without a higher score, every rate is multiplied by
    `plateau_factor`. `cosine` falls from the base rates to 0 over the run.

    Args:
        config: `schedule`, `plateau_patience`, `plateau_factor`.
        rates: base rate of each parameter group by name.
    """

    def __init__(self, config: TrainingConfig, rates: Mapping[str, float]) -> None:
        self._config = config
        self._rates = dict(rates)
        self._best: float | None = None
        self._bad = 0

    def rates_at(self, done: float) -> dict[str, float]:
        """Rate of each group after a share `done` (0 to 1) of the run."""
        if self._config.schedule != "cosine":
            return dict(self._rates)
        share = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return {name: rate * share for name, rate in self._rates.items()}

    def observe(self, score: float | None) -> bool:
        """Take the score of a validation, higher is better; True if a rate was cut.

        None, a score that is not defined, counts neither as a gain nor as a lack of one.
        """
        if score is None:
            return False
        if self._best is None or score > self._best:
            self._best, self._bad = score, 0
            return False
        self._bad += 1
        if self._config.schedule != "plateau" or self._bad <= self._config.plateau_patience:
            return False
        self._bad = 0
        before = dict(self._rates)
        for name, rate in before.items():
            lower = rate * self._config.plateau_factor
            if rate - lower > SMALLEST_CUT:
                self._rates[name] = lower
        return self._rates != before

    def forget(self) -> None:
        """Forget the best score, which scores to come cannot be compared with; rates stay."""
        self._best, self._bad = None, 0

    def state(self) -> dict[str, Any]:
        """Plain values that `restore` takes."""
        return {"rates": dict(self._rates), "best": self._best, "bad": self._bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; groups that it does not list keep their base rate.

        `constant` and `cosine` take their rates from the configuration, so that a changed rate
        counts from the resumed step on; `plateau` keeps its cut rates.
        """
        self._best, self._bad = state["best"], int(state["bad"])
        if self._config.schedule == "plateau":
            self._rates.update({n: float(r) for n, r in state["rates"].items() if n in self._rates})
