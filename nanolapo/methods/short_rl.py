r"""Short-RL: right answers pay for length, but only beyond a tolerance and only while accuracy holds.

Source: arXiv 2505.12284; code lblankl/Short-RL (code read, paper: abstract only).

    R = c * (1 + weight * bonus)  if the batch's accuracy >= the best so far - margin, else c
    bonus = 0.5                   where L <= min(L+) + tol
            0.5 - (L - min(L+)) / (max(L+) - min(L+) + 1e-5)      beyond

tol is 100 tokens, margin 0.05. tol scales with the mean length of its script's base, R1-Distill-1.5B (8086 tokens). In the
code a right answer earns 3 and a wrong one -0.5, format included: there the range of the bonus is 1 / 3.5 of the distance
between right and wrong, here `weight` of it. A badly formed answer earns -3 there (also one that was cut), here 0 like any
wrong one. Their entropy bonus of 0.001 is not built here.

Edge cases: just beyond the tolerance the bonus jumps from 0.5 to 0.5 - tol / (max - min). The longest right answer has
-0.5, so its reward stays above a wrong one's, 0.5 to 0. One right answer, or all within the tolerance: 0.5 for each, so a
group that is right throughout has no signal then. None right: 0 for all. Cut answers are wrong, and their length counts
nowhere. State: the best accuracy of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, NotNegative
from nanolapo.methods.base import Method
from nanolapo.methods.tools import R1_DISTILL, as_parts, each_group, scale
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    tol: NotNegative[float] | None = None  # tokens; None: 100, scaled
    margin: NotNegative[float] = 0.05  # of accuracy
    weight: NotNegative[float] = 1.0  # of the length term


def bonus(lengths: np.ndarray, correct: np.ndarray, tol: float) -> np.ndarray:
    """The length term of one group, float64 [G].

    >>> bonus(np.array([100.0, 150.0, 300.0, 500.0, 50.0]), np.array([True, True, True, True, False]), tol=50).round(3)
    array([ 0.5,  0.5,  0. , -0.5,  0. ])
    """
    if not correct.any():
        return np.zeros(len(lengths))
    shortest, longest = lengths[correct].min(), lengths[correct].max()
    beyond = 0.5 - (lengths - shortest) / (longest - shortest + 1e-5)
    return np.where(correct, np.where(lengths <= shortest + tol, 0.5, beyond), 0.0)


class ShortRl(Method):
    """A length term with a tolerance, while accuracy holds."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        tol = self.options.tol
        self.tol = 100 * scale(config, R1_DISTILL, "method.options.tol") if tol is None else tol
        self.best = 0.0  # accuracy

    def active(self, rollouts: Rollouts) -> bool:
        """True while accuracy holds. The small number is for round-off: 0.05 below the best still counts."""
        return float(rollouts.correct_B.mean()) >= self.best - self.options.margin - 1e-9

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        weight = self.options.weight if self.active(rollouts) else 0.0
        return as_parts(rollouts, each_group(rollouts, lambda n, c: c + weight * bonus(n, c, self.tol)))

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        active = self.active(rollouts)
        self.best = max(self.best, float(rollouts.correct_B.mean()))
        return {"short_rl/active": float(active), "short_rl/best_accuracy": self.best}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
