r"""ShorterBetter: aim at the length of the group's own shortest right answer.

Source: Yi, Wang, Li, arXiv 2504.21370; code JingyangYi/ShorterBetter. We read the code, and of the paper the
abstract.

    R = 2 * c - 0.001 * |L - SOL|          SOL = min(L+); no right answer: SOL = mean(L)

Wrong answers pay for their distance as well. The price per token was published on R1-Distill-1.5B (mean 8086 tokens) and
scales with the inverse of the base's mean length: an answer that is off by that mean costs 8.1 in any run.

Edge cases: no right answer -> the group is pulled to its mean length. A right answer that is longer than SOL by more than a
quarter of the base's mean scores below a wrong answer at SOL.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanolapo.config import Config, NotNegative
from nanolapo.methods.base import Method
from nanolapo.methods.tools import R1_DISTILL, each_group, scale
from nanolapo.rollouts import Rollouts


def shortest_reward(lengths: np.ndarray, correct: np.ndarray, alpha: float = 2.0, beta: float = 0.001) -> np.ndarray:
    """The formula on one group, float64 [G].

    >>> shortest_reward(np.array([800.0, 1000.0, 300.0]), np.array([True, True, False]))   # SOL 800
    array([ 2. ,  1.8, -0.5])
    >>> shortest_reward(np.array([100.0, 300.0]), np.array([False, False]))                # SOL 200
    array([-0.1, -0.1])
    """
    target = lengths[correct].min() if correct.any() else lengths.mean()
    return alpha * correct - beta * np.abs(lengths - target)


@dataclass(frozen=True)
class Options:
    alpha: NotNegative[float] = 2.0  # reward of a right answer
    beta: NotNegative[float] | None = None  # price per token of distance; None: 0.001, scaled


class ShorterBetter(Method):
    """Distance to the shortest right answer of the group."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        beta = self.options.beta
        self.beta = 0.001 / scale(config, R1_DISTILL, "method.options.beta") if beta is None else beta

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        total = each_group(rollouts, lambda n, c: shortest_reward(n, c, self.options.alpha, self.beta))
        verdict = rollouts.correct_B.astype(np.float64)
        extra = (self.options.alpha - 1.0) * verdict
        return {"correct": verdict, "correct_extra": extra, "length": total - verdict - extra}
