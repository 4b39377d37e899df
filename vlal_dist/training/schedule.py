"""Learning rates over a run: plateau on validation mAP (the authors'), cosine, or constant.

Knows names and numbers, no optimizer. The whole state is a dict of plain values for the checkpoint.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

SMALLEST_CUT = 1e-8  # a cut below this is not made, as in torch's ReduceLROnPlateau


class Schedule:
    """Rates of the parameter groups at each step.

    `plateau` equals torch's ReduceLROnPlateau(mode="max", threshold=0): after more than
    `patience` validations without a higher score, every rate is multiplied by `factor`.

    Args:
        kind: `plateau`, `cosine` (from the base rate to 0 over the run), `constant`.
        rates: base rate of each parameter group by name.
        factor: cut of `plateau`, in (0, 1).
        patience: validations without gain that `plateau` bears.
    """

    def __init__(
        self,
        kind: Literal["plateau", "cosine", "constant"],
        *,
        rates: Mapping[str, float],
        factor: float,
        patience: int,
    ) -> None:
        self.kind = kind
        self.factor, self.patience = factor, patience
        self._rates = dict(rates)
        self._best: float | None = None
        self._bad = 0

    def rates_at(self, done: float) -> dict[str, float]:
        """Rate of each group for the next step, when the share `done` (0 to 1) of the run is."""
        if self.kind != "cosine":
            return dict(self._rates)
        share = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return {name: rate * share for name, rate in self._rates.items()}

    def observe(self, score: float) -> bool:
        """Take the score of a validation, higher is better; True if it led to a cut."""
        if self._best is None or score > self._best:
            self._best, self._bad = score, 0
            return False
        self._bad += 1
        if self.kind != "plateau" or self._bad <= self.patience:
            return False
        self._bad = 0
        for name, rate in self._rates.items():
            if rate - rate * self.factor > SMALLEST_CUT:
                self._rates[name] = rate * self.factor
        return True

    def state(self) -> dict[str, Any]:
        """Plain values that `restore` takes."""
        return {"rates": dict(self._rates), "best": self._best, "bad": self._bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; groups that it does not name keep their base rate.

        `constant` and `cosine` take their rates from the configuration, so that a changed rate
        counts from the resumed step on; `plateau` keeps the rates it has come to.
        """
        self._best, self._bad = state["best"], int(state["bad"])
        if self.kind == "plateau":
            self._rates.update({n: float(r) for n, r in state["rates"].items() if n in self._rates})
