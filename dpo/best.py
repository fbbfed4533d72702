"""Which evaluation of a run was the best, for ``train.keep_best`` and ``train.early_stopping``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class BestEvaluation:
    """The lowest held-out loss so far.

    Attributes:
        patience: evaluations without a lower loss that end the run; None: none do.
        loss: the lowest, inf before the first evaluation.
        step: optimizer steps done when it was measured; None before the first.
        evaluations_since: that found no lower one.
    """

    patience: int | None = None
    loss: float = math.inf
    step: int | None = None
    evaluations_since: int = 0

    def hears(self, loss: float, step: int) -> None:
        """Take in the evaluation after ``step``."""
        if loss < self.loss:
            self.loss, self.step, self.evaluations_since = loss, step, 0
        else:
            self.evaluations_since += 1

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.evaluations_since >= self.patience

    def state(self) -> dict[str, float | int | None]:
        """Return what a checkpoint keeps."""
        return {
            "best_loss": None if self.step is None else self.loss,
            "best_step": self.step,
            "evaluations_since_best": self.evaluations_since,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        self.step = state["best_step"]
        self.loss = math.inf if self.step is None else float(state["best_loss"])
        self.evaluations_since = int(state["evaluations_since_best"])
