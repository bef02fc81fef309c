r"""Efficient reasoning ("Group"): a right answer pays for its length relative to the group's right answers.

Source: Arora and Zanette, as described and re-implemented in the LASER paper (arXiv 2505.15612) and its code; their own
text was not read.

    R = c * (1 - a * sigmoid((L - mean(L+)) / std(L+)))         L+: lengths of the group's right answers

The published a are 0.05 to 0.4; our default 0.2 lies between. The standard deviation is the population's (not stated).

Edge cases: no right answer -> zeros. One right answer, or all of one length: z = 0, so each pays a / 2 (the released
code takes mean 0 and std 1 for a single one, which then always pays all of a).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanolapo.methods.base import Method
from nanolapo.methods.tools import as_parts, each_group
from nanolapo.rollouts import Rollouts


def sigmoid_reward(lengths: np.ndarray, correct: np.ndarray, weight: float) -> np.ndarray:
    """The formula on one group, float64 [G].

    >>> sigmoid_reward(np.array([100.0, 300.0, 50.0]), np.array([1, 1, 0]), 0.4).round(4)   # mean 200, std 100: z = -1, 1
    array([0.8924, 0.7076, 0.    ])
    """
    right = correct.astype(bool)
    if not right.any():
        return np.zeros(len(lengths))
    mean, std = lengths[right].mean(), lengths[right].std()
    z = (lengths - mean) / std if std > 1e-6 else np.zeros(len(lengths))
    z = np.where(right, z, 0.0)  # wrong answers may have any length, and get nothing
    return right * (1.0 - weight / (1.0 + np.exp(-z)))


@dataclass(frozen=True)
class Options:
    weight: float = 0.2  # a


class EfficientReasoning(Method):
    """Every group pays for length."""

    Options = Options

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        total = each_group(rollouts, lambda n, c: sigmoid_reward(n, c, self.options.weight))
        return as_parts(rollouts, total)
